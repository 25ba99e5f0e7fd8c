"""Draw pictures, with or without erasures.

    conceptzap generate "a cat in the style of Van Gogh" --with van-gogh
    conceptzap generate "a church" --with church:0.5 --count 4 --compare

Picture k of a prompt has seed N + k. Every PNG carries its prompt, seed, settings and erasures.
Unless told, 20 steps and guidance 4 on the demo, 30 steps and 7.5 on any other base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptzap.cli import _options as options


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
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.png|DIR", parser=options.path,
                     callback=options.png, help="Where to.  [default: images/]"),
    ] = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import api
    from conceptzap.errors import RefusedError
    from conceptzap.terminal import show
    from conceptzap.terminal.gallery import Gallery, compare_sheet
    from conceptzap.terminal.progress import Progress, Unheard

    if policy and compare:
        hint = "leave one of --policy and --compare out"
        raise RefusedError("a comparison would draw without the policy's erasures", hint)
    texts = [*(prompts or ()), *(options.lines(prompt_file) if prompt_file else ())]
    pairs = [options.erasure(text) for text in erasures or ()]
    request = dict(
        base=base, prediction=prediction, seed=seed, count=count, steps=steps, guidance=guidance,
        negative=negative, batch=batch, device=device, dtype=dtype, sampler=sampler,
        **options.size(size, width, height),
    )  # fmt: skip
    report = Progress()
    if doubt := options.check_quotes(prompts or ()):
        report.warn(doubt)
    report.phase(f"loading {base}")
    pictures = api.generate(
        texts, erasures=pairs, policy=policy, strict=strict, report=report, **request
    )
    gallery = Gallery(output, len(texts) * count, force)
    gallery.check(compare)
    drawn = list(gallery.save(report.count(pictures, gallery.count, "drawing")))
    sheet = None
    if compare:
        again = api.generate(texts, **request, report=Unheard(report))
        bare = report.count(again, gallery.count, "drawing the original's")
        sheet = compare_sheet(list(bare), [one for _, one in drawn], gallery.sheet, force)
    images = [show.image_record(path, picture) for path, picture in drawn]
    if as_json:
        show.emit("generate", {"images": images, "compare": show.full(sheet)})
    else:
        show.drawn(images, sheet)
