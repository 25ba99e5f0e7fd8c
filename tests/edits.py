"""Edits over the tiny bases, of every op and gate, and what a UNet makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from conceptzap.base import CROSS, CROSS_K, CROSS_KV, CROSS_V, Base
from conceptzap.edit import Edit, Erasure, Gate, Header, sort_edits
from conceptzap.runtime import adapters, ops
from conceptzap.runtime.attach import attached
from conceptzap.runtime.sight import pooled
from conceptzap.training import detector
from conceptzap.training.states import States
from conceptzap.trust import canary

ASKED = ("van gogh", "a painting of a cat in the style of van gogh", "a house by van gogh")
OTHER = ("", "a photo of a cat", "a painting of a house", "a dog in the style of monet", "a red car")
TIME = 500
CONVS = "unet.*.resnets.0.conv1"
FEED = "unet.*.ff.net.2"
BLOCK = "unet.*.attentions.0"  # gives a tuple, of pictures


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def width(base: Base) -> int:
    return base.unet.config.cross_attention_dim


FITTED: dict[bytes, Gate] = {}  # what all prompts are to a base -> its gate


@cache
def gate(base: Base) -> Gate:
    """Open for the prompts of `ASKED`, shut for those of `OTHER`; bases that read alike share it."""
    twice = [[prompt for prompt in prompts for _ in "ab"] for prompts in (ASKED, OTHER)]
    read = base.encode([*ASKED, *OTHER]).states.float().numpy().tobytes()
    if read not in FITTED:
        found = detector.fit_gate(States.of(base, [*twice[0], *twice[1]]), *twice, seed=0)
        assert found.params["false_open"]["rate"] == found.params["false_shut"]["rate"] == 0
        FITTED[read] = found
    return FITTED[read]


def window(low: int, high: int) -> Gate:
    return Gate("window", {"low": low, "high": high})


def shut() -> Gate:
    """A window that the timestep of these tests is not in."""
    return window(0, TIME - 1)


MIDDLE = "unet.mid_block"


@cache
def sight(base: Base) -> Gate:
    """Opens for what the tiny UNet makes of the prompts of `ASKED`, at `TIME` and the noise of `eps`."""
    prompts, found = [*ASKED, *OTHER], []
    watch = base.module(MIDDLE).register_forward_hook(lambda *given: found.append(pooled(given[-1])))
    with torch.no_grad():
        for seed in range(len(OTHER)):
            base.eps(base.noise([seed] * len(prompts)), TIME, base.encode(prompts))
    watch.remove()
    seen = torch.cat(found).double()  # [seeds * prompts, channels]
    wanted = torch.tensor([1.0] * len(ASKED) + [-1.0] * len(OTHER)).double().repeat(len(OTHER))
    whole = torch.cat([seen, torch.ones(len(seen), 1)], 1)
    line = torch.linalg.solve(whole.T @ whole + 1e-9 * torch.eye(whole.shape[1]), whole.T @ wanted)
    assert ((whole @ line).sign() == wanted).all()
    query, offset = line[None, :-1].float(), -line[-1:].float()
    return probe(query, offset)


def probe(query: Tensor, offset: Tensor, times: Iterable[float] = (TIME,), low: int = 0) -> Gate:
    """A `sight` gate on the middle block: query [k, channels], offset [k] at times [k]."""
    tensors = {"times": torch.tensor(list(times)).float(), "query": query, "offset": offset}
    return Gate("sight", {"site": MIDDLE, "threshold": 0.0, "low": low}, tensors)


def always(base: Base, levels: Iterable[float] = (1.0,), times: Iterable[float] = (TIME,)) -> Gate:
    """A `sight` gate whose score at `times` is `levels`, whatever is drawn."""
    offset = -torch.tensor(list(levels))
    channels = base.unet.config.block_out_channels[-1]
    return probe(torch.zeros(len(offset), channels), offset, times)


def tokens(base: Base, n: int = 3, seed: int = 0, gates: Iterable[Gate] = (), **more: object) -> Edit:
    """Learned rows in context space, at every cross-attention."""
    rows = {f"prompt_{x}": 2 * randn(n, width(base), seed=seed + i) for i, x in enumerate("kv")}
    return Edit("tokens", base.sites(CROSS), rows, gates=tuple(gates), **more)


def halved(base: Base, n: int = 3, **more: object) -> Edit:
    """Learned rows, and others for rows of a call that have no prompt."""
    rows = {slot: 2 * randn(n, width(base), seed=seed) for seed, slot in enumerate(("prompt", "without"))}
    return replace(tokens(base, n, **more), tensors=rows)


def key_values(base: Base, n: int = 2, seed: int = 0, gates: Iterable[Gate] = ()) -> Edit:
    """Learned rows in the key and value space of one cross-attention."""
    site = base.sites(CROSS)[0]
    inner = base.module(f"{site}.to_k").weight.shape[0]
    rows = {f"tokens_{x}": randn(n, inner, seed=seed + i) for i, x in enumerate("kv")}
    return Edit("tokens", (site,), rows, gates=tuple(gates))


def shared(base: Base, r: int = 2, seed: int = 0, gates: Iterable[Gate] = (), **more: object) -> Edit:
    """One pair for all keys and values."""
    d = width(base)
    pair = {"into": randn(d, r, seed=seed) / 4, "down": randn(r, d, seed=seed + 1) / 4}
    return Edit("weight", base.sites(CROSS_KV), pair, gates=tuple(gates), **more)


def low_rank(base: Base, pattern: str = FEED, seed: int = 0, gates: Iterable[Gate] = ()) -> Edit:
    site = base.sites(pattern)[0]
    out, into, *kernel = base.module(site).weight.shape
    ones = [1] * len(kernel)
    up, down = randn(out, 2, *ones, seed=seed) / 8, randn(2, into, *kernel, seed=seed + 1) / 8
    return Edit("weight", (site,), {"up": up, "down": down}, gates=tuple(gates))


def delta(base: Base, pattern: str = FEED, seed: int = 0, gates: Iterable[Gate] = ()) -> Edit:
    site = base.sites(pattern)[0]
    change = randn(*base.module(site).weight.shape, seed=seed) / 16
    return Edit("weight", (site,), {"delta": change}, gates=tuple(gates))


def mask(base: Base, pattern: str = FEED, seed: int = 0, gates: Iterable[Gate] = ()) -> Edit:
    site = base.sites(pattern)[0]
    keep = randn(*base.module(site).weight.shape, seed=seed) > -0.5
    return Edit("weight", (site,), {"keep": keep}, gates=tuple(gates))


def columns(base: Base, pattern: str = FEED, seed: int = 0, gates: Iterable[Gate] = ()) -> Edit:
    """A mask over input features."""
    site = base.sites(pattern)[0]
    keep = randn(base.module(site).weight.shape[1], seed=seed) > -0.5
    return Edit("weight", (site,), {"keep": keep}, gates=tuple(gates))


def packed(base: Base, pattern: str = FEED, seed: int = 0, gates: Iterable[Gate] = ()) -> Edit:
    """`mask`, eight weights to a byte."""
    whole = mask(base, pattern, seed, gates)
    return Edit("weight", whole.sites, {"bits": ops.pack(whole.tensors["keep"])}, gates=whole.gates)


def adapter(base: Base, seed: int = 0, gates: Iterable[Gate] = (), **params: object) -> Edit:
    site = base.sites(FEED)[0]
    out, into = base.module(site).weight.shape
    reads = out if params.get("reads") == "y" else into
    tensors = {
        "up": randn(out, 4, seed=seed) / 4,
        "down": randn(4, reads, seed=seed + 1) / 4,
        "bias": randn(4, seed=seed + 2),
        "center": randn(reads, seed=seed + 3),
    }
    return Edit("adapter", (site,), tensors, params, gates=tuple(gates))


def beside(
    base: Base, pattern: str = BLOCK, seed: int = 0, gates: Iterable[Gate] = (), **params: object
) -> Edit:
    """An adapter at the last module of a pattern, of whatever kind it is."""
    site = base.sites(pattern)[-1]
    out, into = adapters.widths(base.module(site))
    reads, writes = params.get("reads", "x"), params.get("writes", "y")
    down = randn(4, out if reads == "y" else into, seed=seed + 1) / 4
    tensors = {"up": randn(into if writes == "x" else out, 4, seed=seed) / 4, "down": down}
    return Edit("adapter", (site,), tensors, {"phi": "gelu", **params}, gates=tuple(gates))


def attending(base: Base, seed: int = 0, gates: Iterable[Gate] = ()) -> Edit:
    """At the keys of one cross-attention, whose positions look at each other first."""
    site = base.sites(CROSS_K)[0]
    out, into = base.module(site).weight.shape
    shapes = {"query": (3, into), "gate": (into,), "down": (2, into), "up": (out, 2)}
    tensors = {slot: randn(*shape, seed=seed + i) / 4 for i, (slot, shape) in enumerate(shapes.items())}
    return Edit("adapter", (site,), tensors, {"phi": "attend"}, gates=tuple(gates))


def projecting(base: Base, seed: int = 0, gates: Iterable[Gate] = ()) -> Edit:
    """Values of one cross-attention without what they have in common with a text's, all of it."""
    params = {"phi": "project", "slope": 100.0, "shift": -2.0, "height": 1.0}
    prompt = base.encode([ASKED[seed % len(ASKED)]]).states.float()
    return Edit("adapter", base.sites(CROSS_V)[:1], {"prompt": prompt}, params, gates=tuple(gates))


def skip(base: Base, seed: int = 0, gates: Iterable[Gate] = ()) -> Edit:
    """An adapter on what a decoder's layer reads: what comes up to it, and the skip connection."""
    return beside(base, "unet.up_blocks.*.resnets.0", seed, gates, writes="x")


def guide(base: Base, rule: str = "swap", seed: int = 0, gates: Iterable[Gate] = ()) -> Edit:
    """Steers guidance by two texts: from a cat to a dog, or away from a horse."""
    texts = base.encode(["a cat", "a dog"] if rule == "swap" else ["a horse", ""])
    tensors = {"context": texts.states + randn(*texts.states.shape, seed=seed) / 8}
    if texts.pooled is not None:
        tensors["pooled"] = texts.pooled
    if rule == "safe" and base.prediction == "v_prediction":
        tensors["signal"] = base.alphas.sqrt().cpu()
    numbers = {"guidance": 50.0, "threshold": 0.5, "momentum": 0.3, "beta": 0.4, "below": 999}
    params = {"rule": rule, **(numbers if rule == "safe" else {})}
    return Edit("guide", ("unet",), tensors, params, tuple(gates))


TABLE = "text.*.token_embedding"


def in_text(base: Base, pattern: str = "text.*.0.mlp.fc1", seed: int = 0, form: str = "up") -> Edit:
    """A change at the last module of the text encoders that matches: up, into, delta or keep.

    In the first layer, for SDXL reads the states before the last one.
    """
    site = base.sites(pattern)[-1]
    out, into = base.module(site).weight.shape
    slots = {
        "up": {"up": randn(out, 2, seed=seed) / 4, "down": randn(2, into, seed=seed + 1) / 4},
        "into": {"into": randn(into, 2, seed=seed) / 4, "down": randn(2, into, seed=seed + 1) / 4},
        "delta": {"delta": randn(out, into, seed=seed) / 8},
        "keep": {"keep": randn(out, into, seed=seed) < 1},
    }  # fmt: skip
    return Edit("weight", (site,), slots[form])


def conditional(edit: Edit) -> Edit:
    """The same for conditional rows alone."""
    return replace(edit, params={**edit.params, "rows": "conditional"})


def eraser(base: Base) -> tuple[Edit, ...]:
    """Learned rows and a closed-form edit, both behind the gate, at all cross-attentions."""
    return sort_edits((tokens(base, gates=[gate(base)]), shared(base, gates=[gate(base)])))


def erasure(base: Base, edits: Sequence[Edit] = ()) -> Erasure:
    """Made on this base, with its self-test."""
    edits = sort_edits(edits or eraser(base))
    made_on = base.reference(site for edit in edits for site in edit.sites)
    header = Header("Van Gogh", ("van gogh",), ("painting",), made_on)
    test = canary.make(base, edits, ASKED[1])
    return Erasure(Header(**{**vars(header), "canary": test}), edits)


@torch.no_grad()
def eps(base: Base, prompts: Sequence[str], edits: Iterable[Edit] = (), t: int = TIME) -> Tensor:
    """The noise that the base sees under the edits, one row a prompt, in one UNet call."""
    latents = base.noise(range(len(prompts)))
    with attached(base, edits):
        return base.eps(latents, t, base.encode(prompts))


def hooks(base: Base) -> int:
    """Hooks on all modules of the UNet, and those of ours in the text encoders (others have theirs)."""
    ours = (
        hook
        for encoder in base.text_encoders
        for module in encoder.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if type(getattr(hook, "__self__", None)).__module__.startswith("conceptzap")
    )
    modules = base.unet.modules()
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules) + len(list(ours))


def far(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()
