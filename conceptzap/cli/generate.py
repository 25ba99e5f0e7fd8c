"""Draw pictures, with or without erasures.

    conceptzap generate "a cat in the style of Van Gogh" --with van-gogh
    conceptzap generate "a church" --with church --sweep 0,.25,.5,1

Picture k of a prompt has seed N + k. Every PNG carries its prompt, seed, settings and erasures.
Unless told, 20 steps and guidance 4 on the demo, 30 steps and 7.5 on any other base.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from conceptzap.cli import _options as options
from conceptzap.errors import RefusedError, UsageError


def _samplers(incomplete: str) -> list[str]:
    from conceptzap.result import SAMPLERS

    return [name for name in SAMPLERS if name.startswith(incomplete)]


def run(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="What to draw, taken literally.", show_default=False),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", parser=options.path,
                     help="More prompts, one a line; - is stdin."),
    ] = None,
    erasures: options.With = None,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", metavar="FILE", parser=options.path,
                     help="Draw only what this policy allows."),
    ] = None,
    strict: options.Strict = False,
    base: options.Base = "demo",
    prediction: options.Prediction = None,
    seed: options.Seed = 0,
    count: Annotated[int, typer.Option("--count", metavar="N", help="Images per prompt.")] = 1,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", help="Sampling steps, 1 to 1000.")
    ] = None,
    guidance: options.Guidance = None,
    negative: Annotated[
        str, typer.Option("--negative", metavar="P", help="What pictures should not show.")
    ] = "",
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="WxH", help="Pixels, like 768x512.  [default: the base's own]"),
    ] = None,
    width: Annotated[int | None, typer.Option("--width", metavar="N", help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option("--height", metavar="N", help="Pixels.")] = None,
    sampler: Annotated[
        str | None,
        typer.Option("--sampler", metavar="S", autocompletion=_samplers,
                     help="ddim, euler or dpm++.  [default: ddim]"),
    ] = None,
    batch: Annotated[
        int,
        typer.Option("--batch", metavar="N", help="Batch size: larger is faster, and equal within rounding."),
    ] = 1,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    compare: Annotated[
        bool, typer.Option("--compare", help="Also a sheet with the original's pictures beside.")
    ] = False,
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", metavar="S,S...",
                     help="One strip instead, at each of these strengths, like 0,.25,.5,1."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.png|DIR", parser=options.path,
                     callback=options.png, help="Where to.  [default: images/]"),
    ] = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import api
    from conceptzap.terminal import gallery, show
    from conceptzap.terminal.progress import Progress
    from conceptzap.verbs import inspecting

    strengths = options.strengths(sweep)
    _check_sheets(compare, strengths, policy, erasures)
    texts = [*(prompts or ()), *(options.lines(prompt_file) if prompt_file else ())]
    if not texts:
        usual = 'for example: conceptzap generate "a cat"'
        raise UsageError("no picture was asked for", inspecting.offer(Path()) or usual)
    report = Progress()
    if doubt := options.check_quotes(prompts or ()):
        report.warn(doubt)
    report.phase(f"loading {base}")
    pictures = api.generate(
        texts, erasures=[options.erasure(text) for text in erasures or ()], policy=policy,
        strict=strict, base=base, prediction=prediction, seed=seed, count=count, steps=steps,
        guidance=guidance, negative=negative, batch=batch, device=device, dtype=dtype, sampler=sampler,
        strengths=strengths or ((1, 0) if compare else (1,)), report=report,
        **options.size(size, width, height),
    )  # fmt: skip
    kind = gallery.STRIP if strengths else gallery.SHEET if compare else ""
    hall = gallery.Gallery(output, len(texts) * count, force, kind)
    hall.check()
    drawn, sheet = [], None
    if strengths:
        every = list(report.count(pictures, hall.count * len(strengths), "drawing"))
        rows = [every[n : n + hall.count] for n in range(0, len(every), hall.count)]
        sheet = gallery.sweep_sheet(strengths, rows, hall.sheet, force)
    else:
        first = itertools.islice(pictures, hall.count)
        drawn = list(hall.save(report.count(first, hall.count, "drawing")))
    if compare:
        bare = list(report.count(pictures, hall.count, "drawing the original's"))
        sheet = gallery.compare_sheet(bare, [one for _, one in drawn], hall.sheet, force)
    images = [show.image_record(path, picture) for path, picture in drawn]
    if as_json:
        sheets = {"compare": show.full(sheet if compare else None)}
        sheets |= {"sweep": show.full(sheet)} if strengths else {}
        show.emit("generate", {"images": images, **sheets})
    else:
        show.drawn(images, sheet)


def _check_sheets(
    compare: bool, strengths: Sequence[float], policy: Path | None, erasures: Sequence[str] | None
) -> None:
    if policy and (compare or strengths):
        hint = f"leave one of --policy and --{'compare' if compare else 'sweep'} out"
        raise RefusedError("a comparison would draw without the policy's erasures", hint)
    if strengths and (compare or not erasures):
        what = "--sweep with 0 is a comparison" if compare else "--sweep of no erasure"
        hint = "leave --compare out" if compare else "for example: --with van-gogh --sweep 0,.5,1"
        raise UsageError(what, hint)
