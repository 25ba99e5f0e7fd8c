"""A checkpoint as a handle, which encodes texts, predicts noise and decodes pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from conceptzap.base import bpe, identity, layout, loading, modules, schedule
from conceptzap.base.cond import Cond
from conceptzap.base.modules import PREFIX, find_module
from conceptzap.edit import BaseRef
from conceptzap.errors import MismatchError, ResourceError
from conceptzap.registry import config

CROSS = "unet.*.attn2"
CROSS_K = "unet.*.attn2.to_k"
CROSS_V = "unet.*.attn2.to_v"
CROSS_KV = "unet.*.attn2.to_[kv]"
SELF = "unet.*.attn1"

Size = tuple[int, int]  # height and width in pixels
# side of the latents where a UNet's config does not say; Stable Diffusion 2 sees v at 768 px
SIDES = {"sd1": 64, "sd2": 64, "sdxl": 128}
SIDE_OF_V = 96
# pixels decoded at once: 2 pictures of 512 px, 1 of 1024. Fixed, for the bits of pictures that are
# decoded together may depend on their number
PIXELS = 2**19


@dataclass(eq=False, repr=False)
class Base:
    """A checkpoint: a frozen one by `load_base`, one over your pipeline by `from_pipeline`.

    `zero_negative`: no negative prompt is zeros, not the empty text (SDXL says so of itself).
    """

    unet: Any  # a UNet2DConditionModel; diffusers' classes have no types to speak of
    text_encoders: tuple[nn.Module, ...]
    tokenizers: tuple[Any, ...]
    vae: Any
    scheduler_config: dict[str, Any]
    prediction: str
    family: str
    id: str
    revision: str
    device: torch.device
    dtype: torch.dtype
    zero_negative: bool = False

    def __repr__(self) -> str:
        return f"Base({self.family}, {self.id}, {self.device}, {self.dtype})"

    def frozen(self) -> Base:
        """Itself, once no parameter asks for a gradient and every module is in eval mode."""
        for module in (self.unet, *self.text_encoders, self.vae):
            module.requires_grad_(False).eval()
        return self

    # -- conditioning --------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        prompts_2: Sequence[str] | None = None,
        size: Size | None = None,
    ) -> Cond:
        """Text states of the prompts, padded to the encoder's length; longer prompts are cut there.

        SD 1.x and 2.x: the encoder's last hidden state. SDXL: the penultimate ones of both, side by
        side, the second's pooled text, and size ids for an uncropped picture of `size` (the base's
        own); its second encoder may read `prompts_2` instead.
        """
        return self.encode_ids(self.token_ids(prompts, prompts_2), size)

    def encode_ids(self, ids: Sequence[Tensor], size: Size | None = None) -> Cond:
        """`encode` for token ids [n, length] per text encoder; gradients flow, the caller decides."""
        outputs = [
            encoder(each.to(self.device), output_hidden_states=True)
            for encoder, each in zip(self.text_encoders, ids, strict=True)
        ]
        if self.family != "sdxl":
            return Cond(outputs[0].last_hidden_state)  # [n, 77, d]
        states = torch.cat([output.hidden_states[-2] for output in outputs], -1)  # [n, 77, d1 + d2]
        size = size or self.size
        # original height and width, top and left of the crop, height and width to be drawn
        sizes = torch.tensor([[*size, 0, 0, *size]], dtype=self.dtype, device=self.device)
        return Cond(states, outputs[-1].text_embeds, sizes.expand(len(states), -1))

    def unconditional(self, negative: str = "", size: Size | None = None) -> Cond:
        """One row that guidance leads away from: the negative prompt, or what stands for none."""
        cond = self.encode([negative], size=size)
        return cond.zeroed() if self.zero_negative and not negative else cond

    def token_ids(
        self, prompts: Sequence[str], prompts_2: Sequence[str] | None = None
    ) -> list[Tensor]:
        """Token ids [n, length] per text encoder, padded and cut as `encode` does."""
        texts = (prompts, prompts if prompts_2 is None else prompts_2)
        return [
            tokenizer(
                list(text),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer, text in zip(self.tokenizers, texts, strict=False)
        ]

    # -- noise ---------------------------------------------------------------------------------

    def predict(self, latents: Tensor, t: float | Tensor, cond: Cond) -> Tensor:
        """What the UNet itself predicts, noise or v, at `t` (one, or [n]); one UNet call.

        `latents` [n, c, h, w] as `noise` makes them, whatever more the UNet reads. Gradients flow;
        the caller decides.
        """
        cond = cond.to(self.device, self.dtype)
        added = None
        if cond.pooled is not None:
            added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
        return self.unet(
            self._whole_input(latents).to(self.dtype),
            torch.as_tensor(t, device=self.device).expand(len(latents)),
            encoder_hidden_states=cond.states,
            added_cond_kwargs=added,
        ).sample.to(latents.dtype)

    def eps(self, latents: Tensor, t: int | Tensor, cond: Cond) -> Tensor:
        """The noise seen in `latents` [n, c, h, w] at timestep `t` (one, or [n]); one UNet call.

        Always noise, whatever the checkpoint predicts: eps = sqrt(a) v + sqrt(1 - a) x for
        v-prediction (Salimans and Ho 2022, appendix D); where a = 0, that is x itself.
        """
        output = self.predict(latents, t, cond)
        if self.prediction == "epsilon":
            return output
        steps = torch.as_tensor(t, device=self.device).long().expand(len(latents))
        alpha = self.alphas.to(latents)[steps].view(-1, 1, 1, 1)
        return alpha.sqrt() * output + (1 - alpha).sqrt() * latents

    def _whole_input(self, latents: Tensor) -> Tensor:
        """The UNet's input [n, in_channels, h, w]: what it reads beside the latents says nothing.

        Inpainting: a mask of ones, and the picture under it is grey. Depth and pix2pix: zeros.
        """
        beside = self.unet.config.in_channels - latents.shape[1]
        if not beside:
            return latents
        n, channels, *area = latents.shape
        if beside != channels + 1:
            return torch.cat([latents, latents.new_zeros(n, beside, *area)], 1)
        grey = self._grey(*area).to(latents).expand(n, -1, -1, -1)
        return torch.cat([latents, latents.new_ones(n, 1, *area), grey], 1)

    @torch.no_grad()
    def _grey(self, height: int, width: int) -> Tensor:
        """Latents [1, c, height, width] of a grey picture, zeros where the VAE cannot tell."""
        if (height, width) not in self._greys:
            grey = torch.zeros(1, 3, height * self.factor, width * self.factor)
            if self.vae.encoder is None:
                latents = torch.zeros(1, self.latent_shape[0], height, width)
            else:
                with _upcast(self.vae) as dtype:
                    coded = self.vae.encode(grey.to(self.device, dtype)).latent_dist.mode()
                shift = self.vae.config.shift_factor or 0
                latents = (coded.float() - shift) * self.vae.config.scaling_factor
            self._greys[height, width] = latents
        return self._greys[height, width]

    @cached_property
    def _greys(self) -> dict[tuple[int, int], Tensor]:
        return {}

    @cached_property
    def alphas(self) -> Tensor:
        """Cumulative alpha-bar of every training timestep, [1000], fp32 on the base's device."""
        return self.scheduler().alphas_cumprod.to(self.device)

    def scheduler(self, sampler: str = "ddim") -> Any:
        """A fresh diffusers scheduler with the checkpoint's own noise schedule."""
        return schedule.scheduler(self.scheduler_config, self.prediction, sampler)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one picture's latents."""
        side = getattr(self.unet.config, "sample_size", None)
        if side is None:
            v = self.family == "sd2" and self.prediction == "v_prediction"
            side = SIDE_OF_V if v else SIDES[self.family]
        height, width = (side, side) if isinstance(side, int) else side
        return self.vae.config.latent_channels, height, width

    def noise(self, seeds: Iterable[int], size: Size | None = None) -> Tensor:
        """Normal latents [n, c, h, w], fp32; each row from its own CPU generator of that seed.

        For pictures of `size`, the base's own if none is given.
        """
        shape = self.latent_shape
        if size:
            shape = (shape[0], size[0] // self.factor, size[1] // self.factor)
        rows = [
            torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds
        ]
        return torch.stack(rows).to(self.device)

    # -- pictures ------------------------------------------------------------------------------

    @property
    def factor(self) -> int:
        """Pixels to one latent, in height as in width."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size(self) -> Size:
        """Height and width of the checkpoint's own pictures, in pixels."""
        _, height, width = self.latent_shape
        return height * self.factor, width * self.factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of `latents` [n, c, h, w]: uint8 [n, height, width, 3] on the CPU.

        A few at a time, so that memory does not grow with n. Raises `ResourceError` where the
        VAE's numbers overflow: such pictures show nothing.
        """
        with _upcast(self.vae) as dtype:
            scaled = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
            rows = max(1, PIXELS // (latents[0, 0].numel() * self.factor**2))
            parts = [part.to(self.device, dtype) for part in scaled.split(rows)]
            return torch.cat([self._pictures(part) for part in parts])

    def _pictures(self, scaled: Tensor) -> Tensor:
        pictures = self.vae.decode(scaled).sample
        if not pictures.isfinite().all():
            raise ResourceError("the decoded pictures are not finite", "try --dtype float32")
        pictures = (pictures.float() / 2 + 0.5).clamp(0, 1) * 255
        return pictures.round().to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous()

    # -- modules -------------------------------------------------------------------------------

    def sites(self, pattern: str) -> tuple[str, ...]:
        """Paths of the modules that match a shell pattern such as "unet.*.attn2" or "text.*"."""
        return modules.sites(self, pattern)

    def module(self, site: str) -> nn.Module:
        """The module at a path of `sites`; raises like `find_module`."""
        return find_module(self, site)

    # -- identity ------------------------------------------------------------------------------

    @property
    def ref(self) -> BaseRef:
        """This base as a file's header names it, with the parts that every fingerprint has."""
        return self.reference(())

    def reference(self, sites: Iterable[str]) -> BaseRef:
        """This base as the header of an erasure at `sites` names it."""
        prints = self.fingerprint(sites)
        return BaseRef(self.family, self.id, self.revision, self.signature, prints)

    @cached_property
    def signature(self) -> str:
        """sha256 over the sorted names and shapes of all UNet and text encoder parameters."""
        unet = [(PREFIX + name, value) for name, value in identity.parameters(self.unet)]
        return identity.signature([*unet, *self._text_parameters()])

    def _text_parameters(self) -> identity.Named:
        return identity.text_parameters(self.text_encoders, self.tokenizers)

    @cached_property
    def _prints(self) -> dict[str, str]:
        return {}

    def fingerprint(self, sites: Iterable[str]) -> dict[str, str]:
        """Part -> sha256 of its fp16-rounded weights: `attn2`, `text`, and `unet` where sites ask.

        Computed once per part, so the base must not be trained in place. Taken of the weights as
        they are stored: a pipeline that somebody loaded in bfloat16 has lost these, and counts as
        another checkpoint.
        """
        parts = ["attn2", "text"]
        if not all(re.search(r"\.attn2(\.|$)|^text\.", site) for site in sites):
            parts.append("unet")
        if missing := [name for name in parts if name not in self._prints]:
            named = identity.parameters(self.unet), self._text_parameters()
            self._prints |= {name: identity.digest(identity.part(name, *named)) for name in missing}
        return {name: self._prints[name] for name in parts}

    @cached_property
    def is_demo(self) -> bool:
        """Whether these are the weights of the built-in checkpoint, whatever they are called."""
        small = bpe.is_small(self.tokenizers[0])
        return small and self.fingerprint(()) == loading.demo_fingerprint()

    # -- words ---------------------------------------------------------------------------------

    @property
    def max_tokens(self) -> int:
        """Tokens a prompt may have, start and end not counted."""
        return self.tokenizers[0].model_max_length - 2

    def token_count(self, text: str) -> int:
        """Tokens of `text`, start and end not counted, nothing cut."""
        return len(self._ids(text))

    def cut(self, text: str) -> str:
        """The end of a prompt that `encode` leaves out, "" where it fits."""
        return self.tokenizers[0].decode(self._ids(text)[self.max_tokens :])

    def _ids(self, text: str) -> list[int]:
        # verbose would warn of long texts, which are wanted whole here
        return self.tokenizers[0](text, add_special_tokens=False, verbose=False).input_ids

    def unknown_words(self, text: str) -> list[str]:
        """Words of `text` that the base cannot have learned, in order, each once.

        A word is unknown when a part of it has no token; with a vocabulary made for its captions also
        when it is not one token of its own; to the built-in checkpoint when no caption had it.
        """
        if text not in self._told:
            words = dict.fromkeys(re.findall(r"\w+|[^\w\s]+", text.lower()))
            self._met.update((word, self._knows(word)) for word in words.keys() - self._met.keys())
            self._told[text] = [word for word in words if not self._met[word]]
        return list(self._told[text])

    @cached_property
    def _told(self) -> dict[str, list[str]]:
        """Text -> its unknown words: prompts of lessons are asked about again and again."""
        return {}

    @cached_property
    def _met(self) -> dict[str, bool]:
        """Word -> whether it is known, of those that were asked about; prompts repeat theirs."""
        return {}

    def _knows(self, word: str) -> bool:
        tokenizer, ids = self.tokenizers[0], self._ids(word)
        none = {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
        if not ids or none & set(ids):
            return False
        if not bpe.is_small(tokenizer):
            return True
        if self.is_demo and word.isalnum():  # "lock" is a token there, the end of "clock"
            return word in config.demo_words()
        return len(ids) == 1

    def vocabulary(self) -> tuple[str, ...]:
        """Whole words of the tokenizer: three letters or more, a to z, in its own order."""
        words = bpe.whole_words(self.tokenizers[0])
        return tuple(word for word in words if self._knows(word)) if self.is_demo else words

    # -- other people's code -------------------------------------------------------------------

    def pipeline(self) -> Any:
        """A plain diffusers pipeline over the same modules, with a DDIM scheduler.

        Raises `MismatchError` for a depth checkpoint: its pipeline needs a depth estimator.
        """
        import diffusers

        shared = {"vae": self.vae, "unet": self.unet, "scheduler": self.scheduler()}
        encoders = zip(self.text_encoders, self.tokenizers, strict=True)
        for number, (encoder, tokenizer) in enumerate(encoders, 1):
            suffix = f"_{number}" if number > 1 else ""
            shared |= {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": tokenizer}
        xl = self.family == "sdxl"
        beside = self.unet.config.in_channels - self.latent_shape[0]
        if beside not in layout.KINDS:
            raise MismatchError(f"{self.id} is drawn with depth, which is not loaded", layout.USABLE)
        cls = getattr(diffusers, f"StableDiffusion{'XL' * xl}{layout.KINDS[beside]}Pipeline")
        if xl:
            zeros = {"force_zeros_for_empty_prompt": self.zero_negative}
            return cls(**shared, **zeros, add_watermarker=False)
        return cls(
            **shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )


@contextmanager
def _upcast(vae: Any) -> Iterator[torch.dtype]:
    """A VAE that overflows in fp16 (`force_upcast`) decodes in fp32 and is put back."""
    if vae.dtype != torch.float16 or not vae.config.force_upcast:
        yield vae.dtype
        return
    # torch's own `to`: diffusers' warns of a cast at every call, and this one is undone
    nn.Module.to(vae, torch.float32)
    try:
        yield torch.float32
    finally:
        nn.Module.to(vae, torch.float16)
