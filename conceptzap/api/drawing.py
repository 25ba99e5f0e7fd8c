"""The verbs that draw with erasures, with our sampler or in a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conceptzap.report import Bars, Report
from conceptzap.trust.admission import Asked
from conceptzap.verbs import generating
from conceptzap.verbs.generating import Picture

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from conceptzap.verbs.applying import Handle
    from conceptzap.verbs.generating import AnyBase


def generate(
    prompts: Sequence[str] | str,
    *,
    erasures: Asked | Iterable[Asked] = (),
    base: AnyBase = "demo", prediction: str | None = None,
    seed: int = 0, count: int = 1,
    steps: int | None = None, guidance: float | None = None,
    negative: str = "",
    width: int | None = None, height: int | None = None,
    sampler: str | None = None, batch: int = 1,
    strengths: Iterable[float] = (1.0,),
    device: str = "auto", dtype: str = "auto",
    policy: Path | str | None = None,
    strict: bool = False,
    report: Report | None = None,
) -> Iterator[Picture]:  # fmt: skip
    """Draw `count` pictures of every prompt, picture k with seed `seed` + k, under the erasures.

    `erasures` are paths or values, or pairs of one and its strength (0 to 2); the same one twice
    counts once. All pictures are drawn once for each of `strengths`, by which those of the erasures
    are multiplied: `(0, 0.5, 1)` draws them by the base alone, at a half, and as asked for. Under a
    `policy` its own files are in force, as they are. `base` is a name, a path, a diffusers
    pipeline or a `Base`; `width` and `height` in pixels are the checkpoint's own unless given,
    `sampler` one of ddim, euler and dpm++.

    Nothing is drawn before the first picture is taken from what comes back. Requests and files are
    checked at the call, the base when the first picture is asked for. Raises `SilentEditError`
    rather than giving out a picture that an edit did not take part in.
    """
    look = {
        "steps": steps, "guidance": guidance, "negative": negative, "batch": batch,
        "width": width, "height": height, "scheduler": sampler,
    }  # fmt: skip
    asked = generating.request(
        prompts, seed=seed, count=count, look=look, erasures=erasures, policy=policy, strict=strict,
        strengths=strengths,
    )  # fmt: skip
    return generating.pictures(
        asked, base, report or Bars(), device=device, dtype=dtype, prediction=prediction
    )


def demo_pipeline() -> DiffusionPipeline:
    """A diffusers pipeline over the built-in checkpoint (64 px, on the CPU): something to try on."""
    from conceptzap.base import load_base

    return load_base("demo", "cpu").pipeline()


def apply(
    pipe: DiffusionPipeline,
    erasures: Asked | Iterable[Asked],
    strength: float = 1.0,
    strict: bool = False,
) -> Handle:
    """Attach erasures to a diffusers pipeline; every call of it from now on is erased or raises.

    `erasures` is a path, a value, a pair of one and its strength, or a list of these. A second call
    stacks; the handle's `remove()`, or the end of a `with` block, takes its own off again. Raises
    `FormatError`, `MismatchError` for another architecture and `RefusedError` if an edit does not
    act on this pipeline; nothing is attached then. Another checkpoint is warned of, with `strict`
    refused.

    It does not travel: `pipe.save_pretrained` writes the base, with nothing erased. Ship the file
    beside it, or write the erasure into weights with `export`.
    """
    from conceptzap.verbs import applying

    return applying.apply(pipe, erasures, strength, strict)


def applied(pipe: DiffusionPipeline) -> tuple[Handle, ...]:
    """The handles of all erasures on the pipeline's UNet, first to last."""
    from conceptzap.verbs import applying

    return applying.applied(pipe)


def remove(pipe: DiffusionPipeline) -> None:
    """Take every erasure off the pipeline's UNet, bit for bit; none there is no error."""
    from conceptzap.verbs import applying

    applying.remove(pipe)
