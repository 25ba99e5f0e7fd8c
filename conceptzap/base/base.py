"""A checkpoint as a handle: `load_base` finds one, `Base` encodes, predicts noise and decodes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

from conceptzap.base import bpe, devices, layout, loading
from conceptzap.edit import BaseRef
from conceptzap.errors import MismatchError, ResourceError

PREFIX = "unet."
CROSS = "unet.*.attn2"
CROSS_K = "unet.*.attn2.to_k"
CROSS_V = "unet.*.attn2.to_v"
CROSS_KV = "unet.*.attn2.to_[kv]"
SELF = "unet.*.attn1"

# what wrappers (LoRA, torch.compile) and library versions put into a parameter's name
_WRAPPING = re.compile(r"(^|\.)(_orig_mod|base_layer)(?=\.)|^text_model\.")


@dataclass(frozen=True)
class Cond:
    """What the UNet is conditioned on, one row a prompt.

    `states` [n, length, width]; SDXL alone has `pooled` [n, width] and `time_ids` [n, 6].
    """

    states: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def _map(self, change: Any) -> Cond:
        fields = (self.states, self.pooled, self.time_ids)
        return Cond(*(None if field is None else change(field) for field in fields))

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Cond:
        """The chosen rows; a single index keeps the row dimension."""
        index = [rows] if isinstance(rows, int) else rows
        return self._map(lambda field: field[index])

    def to(self, *args: Any, **kwargs: Any) -> Cond:
        return self._map(lambda field: field.to(*args, **kwargs))

    def repeat(self, times: int) -> Cond:
        """All rows `times` times over, in the order a, b, a, b."""
        return self._map(lambda field: torch.cat([field] * times))

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """The rows of all, in order."""
        columns = zip(*((c.states, c.pooled, c.time_ids) for c in conds), strict=True)
        return Cond(*(None if column[0] is None else torch.cat(column) for column in columns))


@dataclass(eq=False, repr=False)
class Base:
    """A checkpoint: a frozen one by `load_base`, one over your pipeline by `from_pipeline`."""

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

    def __repr__(self) -> str:
        return f"Base({self.family}, {self.id}, {self.device}, {self.dtype})"

    def frozen(self) -> Base:
        """Itself, once no parameter asks for a gradient and every module is in eval mode."""
        for module in (self.unet, *self.text_encoders, self.vae):
            module.requires_grad_(False).eval()
        return self

    # -- conditioning --------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Cond:
        """Text states of the prompts, padded to the encoder's length; longer prompts are cut there.

        SD 1.x and 2.x: the encoder's last hidden state. SDXL: the penultimate ones of both, side by
        side, the second's pooled text, and size ids for an uncropped picture of the base's size.
        """
        outputs = [
            encoder(ids.to(self.device), output_hidden_states=True)
            for encoder, ids in zip(self.text_encoders, self.token_ids(prompts), strict=True)
        ]
        if self.family != "sdxl":
            return Cond(outputs[0].last_hidden_state)
        states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        size = self.size
        ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=self.dtype, device=self.device)
        return Cond(states, outputs[-1].text_embeds, ids.expand(len(states), -1))

    def token_ids(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids [n, length] per text encoder, padded and cut as `encode` does."""
        return [
            tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers
        ]

    # -- noise ---------------------------------------------------------------------------------

    def eps(self, latents: Tensor, t: int | Tensor, cond: Cond) -> Tensor:
        """The noise seen in `latents` [n, c, h, w] at timestep `t` (one, or [n]); one UNet call.

        Always noise, whatever the checkpoint predicts: eps = sqrt(a) v + sqrt(1 - a) x for
        v-prediction (Salimans and Ho 2022, appendix D). Gradients flow; the caller decides.
        """
        steps = torch.as_tensor(t, device=self.device).expand(len(latents))
        cond = cond.to(self.device, self.dtype)
        added = None
        if cond.pooled is not None:
            added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
        output = self.unet(
            latents.to(self.dtype),
            steps,
            encoder_hidden_states=cond.states,
            added_cond_kwargs=added,
        ).sample.to(latents.dtype)
        if self.prediction == "epsilon":
            return output
        alpha = self.alphas.to(latents)[steps].view(-1, 1, 1, 1)
        return alpha.sqrt() * output + (1 - alpha).sqrt() * latents

    @cached_property
    def alphas(self) -> Tensor:
        """Cumulative alpha-bar of every training timestep, [1000], fp32 on the base's device."""
        return self.scheduler().alphas_cumprod.to(self.device)

    def scheduler(self) -> Any:
        """A fresh DDIM scheduler with the checkpoint's own noise schedule."""
        return loading.ddim(self.scheduler_config, self.prediction)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one picture's latents."""
        side = self.unet.config.sample_size
        return self.unet.config.in_channels, side, side

    def noise(self, seeds: Iterable[int]) -> Tensor:
        """Normal latents [n, c, h, w], fp32; each row from its own CPU generator of that seed."""
        rows = [
            torch.randn(self.latent_shape, generator=torch.Generator("cpu").manual_seed(seed))
            for seed in seeds
        ]
        return torch.stack(rows).to(self.device)

    # -- pictures ------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Height and width of the checkpoint's own pictures, in pixels."""
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of `latents` [n, c, h, w]: uint8 [n, height, width, 3] on the CPU.

        Raises `ResourceError` where the VAE's numbers overflow: such pictures show nothing.
        """
        with _upcast(self.vae) as dtype:
            scaled = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
            pictures = self.vae.decode(scaled.to(self.device, dtype)).sample
        if not pictures.isfinite().all():
            raise ResourceError("the decoded pictures are not finite", "try --dtype float32")
        pictures = (pictures.float() / 2 + 0.5).clamp(0, 1) * 255
        return pictures.round().to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous()

    # -- modules -------------------------------------------------------------------------------

    def sites(self, pattern: str) -> tuple[str, ...]:
        """Paths of the modules that match a shell pattern such as "unet.*.attn2", in UNet order."""
        paths = (PREFIX + name for name, _ in self.unet.named_modules() if name)
        return tuple(path for path in paths if fnmatchcase(path, pattern))

    def module(self, site: str) -> nn.Module:
        """The module at a path of `sites`; `MismatchError` where there is none."""
        try:
            if site.startswith(PREFIX):
                return self.unet.get_submodule(site.removeprefix(PREFIX))
        except AttributeError:
            pass
        raise MismatchError(f"{self.id} has no module {site}", "use the base it was made for")

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
        lines = (
            f"{prefix}{name} {list(value.shape)}\n"
            for prefix, module in self._named_modules()
            for name, value in parameters(module)
        )
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()

    def _named_modules(self) -> list[tuple[str, nn.Module]]:
        encoders = [(f"text_encoder_{n}.", m) for n, m in enumerate(self.text_encoders, 1)]
        return [(PREFIX, self.unet), *encoders]

    @cached_property
    def _prints(self) -> dict[str, str]:
        return {}

    def fingerprint(self, sites: Iterable[str]) -> dict[str, str]:
        """Part -> sha256 of its fp16-rounded weights: `attn2`, `text`, and `unet` where sites ask.

        Computed once per part, so the base must not be trained in place.
        """
        parts = ["attn2", "text"]
        if not all(re.search(r"\.attn2(\.|$)", site) for site in sites):
            parts.append("unet")
        for part in parts:
            if part not in self._prints:
                self._prints[part] = _digest(self._part(part))
        return {part: self._prints[part] for part in parts}

    def _part(self, part: str) -> list[tuple[str, Tensor]]:
        if part == "text":
            encoders = self._named_modules()[1:]
            return [
                (prefix + name, value) for prefix, m in encoders for name, value in parameters(m)
            ]
        everything = parameters(self.unet)
        return [(n, v) for n, v in everything if part == "unet" or ".attn2." in n]

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

        A word is unknown when a part of it has no token; with a vocabulary made for its captions
        (the demo's) also when it is not one token of its own.
        """
        words = dict.fromkeys(re.findall(r"\w+|[^\w\s]+", text.lower()))
        return [word for word in words if not self._knows(word)]

    def _knows(self, word: str) -> bool:
        tokenizer, ids = self.tokenizers[0], self._ids(word)
        none = {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
        if not ids or none & set(ids):
            return False
        return len(ids) == 1 or not bpe.is_small(tokenizer)

    def vocabulary(self) -> tuple[str, ...]:
        """Whole words of the tokenizer: three letters or more, a to z, in its own order."""
        return bpe.whole_words(self.tokenizers[0])

    # -- other people's code -------------------------------------------------------------------

    def pipeline(self) -> Any:
        """A plain diffusers pipeline over the same modules, with a DDIM scheduler."""
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

        shared = {"vae": self.vae, "unet": self.unet, "scheduler": self.scheduler()}
        encoders = zip(self.text_encoders, self.tokenizers, strict=True)
        for number, (encoder, tokenizer) in enumerate(encoders, 1):
            suffix = f"_{number}" if number > 1 else ""
            shared |= {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": tokenizer}
        if self.family == "sdxl":
            return StableDiffusionXLPipeline(**shared, add_watermarker=False)
        return StableDiffusionPipeline(
            **shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )


@contextmanager
def _upcast(vae: Any) -> Iterator[torch.dtype]:
    """A VAE that overflows in fp16 (`force_upcast`) decodes in fp32 and is put back."""
    if vae.dtype != torch.float16 or not vae.config.force_upcast:
        yield vae.dtype
        return
    vae.to(torch.float32)
    try:
        yield torch.float32
    finally:
        vae.to(torch.float16)


def parameters(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters by name, sorted, called as in the plain checkpoint; a LoRA's are left out."""
    own = ((name, value) for name, value in module.named_parameters() if "lora_" not in name)
    named = ((_WRAPPING.sub("", name).lstrip("."), value) for name, value in own)
    return sorted(named, key=lambda pair: pair[0])


def _digest(named: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, value in named:
        if value.is_meta:
            raise ResourceError(f"{name} is offloaded, so it cannot be read", "do this before that")
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.detach().to("cpu", torch.float16).contiguous().numpy().data)
    return digest.hexdigest()


def load_base(
    name: str = "demo", device: str = "auto", dtype: str = "auto", prediction: str | None = None
) -> Base:
    """The checkpoint called `name`: demo, a folder, a .safetensors file, or a hub id[@revision].

    `device`: auto (cuda, then mps, then cpu), cpu, cuda[:n], mps. `dtype`: auto (fp16 on cuda, else
    fp32), float32, float16, bfloat16; the CPU always computes in fp32. `prediction`: epsilon or
    v_prediction where the checkpoint does not say. Raises `UsageError` for a word that means
    nothing, `ResourceError` for a device or checkpoint that is missing, broken or pickled,
    `MismatchError` for an architecture or weights that cannot be used.
    """
    place = devices.pick_device(device)
    numbers = devices.pick_dtype(dtype, place)
    parts = loading.read(name, numbers, prediction)
    for module in (parts.unet, *parts.text_encoders, parts.vae):
        module.to(place)
    return Base(**vars(parts), device=place, dtype=numbers).frozen()


def from_pipeline(pipe: Any) -> Base:
    """A base over the modules of a diffusers pipeline, which stays as it is.

    Raises `MismatchError` for a pipeline without a UNet that reads text.
    """
    encoders, tokenizers = (
        tuple(part for part in (getattr(pipe, f"{kind}{n}", None) for n in ("", "_2")) if part)
        for kind in ("text_encoder", "tokenizer")
    )
    if getattr(pipe, "unet", None) is None or not encoders:
        raise MismatchError(f"a {type(pipe).__name__} has no UNet that reads text", layout.USABLE)
    scheduler = dict(pipe.scheduler.config)
    return Base(
        unet=pipe.unet,
        text_encoders=encoders,
        tokenizers=tokenizers,
        vae=pipe.vae,
        scheduler_config=scheduler,
        prediction=scheduler.get("prediction_type", "epsilon"),
        family=loading.family_of(pipe.unet.config, encoders),
        id=PurePath(str(pipe.config.get("_name_or_path") or type(pipe).__name__)).name,
        revision="",
        device=pipe.device,
        dtype=pipe.unet.dtype,
    )
