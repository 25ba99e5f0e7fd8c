"""Write erasures as a LoRA, a checkpoint or a pipeline folder.

    conceptzap export uce.lprompt.safetensors --to lora -o uce-lora
    conceptzap export uce.lprompt.safetensors esd.lprompt.safetensors --to checkpoint -o erased

Only changes of weights that hold for every prompt fit into a LoRA or a checkpoint, whole or not at all:
what stands behind a gate, as all that the default method makes, or adds tokens needs conceptzap, as in the
folder that --to diffusers writes: diffusers draws it erased where conceptzap is installed, and not at all
elsewhere. Dense changes
fit into a LoRA by their --rank largest components. A checkpoint is the base with the
change in its weights: a diffusers folder, or one file for ComfyUI and others where --output ends in
.safetensors. It is read back and compared before it gets its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptzap.cli import _options as options
from conceptzap.registry import family

FORMATS = list(family.files("exports"))  # those that other packages bring are completed


def _formats(incomplete: str) -> list[str]:
    return [name for name in family.members("exports") if name.startswith(incomplete)]


def run(
    erasures: Annotated[
        list[str],
        typer.Argument(metavar="FILE[:STRENGTH]", help="Erasures, written as one.",
                       show_default=False),
    ],
    to: Annotated[
        str,
        typer.Option("--to", metavar="FORMAT", autocompletion=_formats,
                     help=f"{' or '.join(FORMATS)}."),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE|DIR", parser=options.path,
                     help="The LoRA file, or the folder."),
    ],
    base: options.Base = "demo",
    prediction: options.Prediction = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="N", help="Components of a dense change that a LoRA keeps."),
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option("--keys", metavar="K",
                     help="A LoRA's names: kohya, original (SDXL), diffusers or peft.  [default: kohya]"),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="T",
                     help="float32, float16, bfloat16; auto: as narrow as loses nothing."),
    ] = "auto",
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import api
    from conceptzap.terminal import show
    from conceptzap.terminal.progress import Progress

    files = [options.erasure(text) for text in erasures]
    report = Progress()
    report.phase(f"loading {base}")
    made = api.export(
        files, to, output, base=base, prediction=prediction, rank=rank, keys=keys, dtype=dtype,
        force=force, report=report,
    )  # fmt: skip
    if as_json:
        show.emit("export", {"path": show.full(made.path), **made.record()})
    else:
        what = f"{to} in {made.facts['dtype']}, {show.size(made.bytes)}"
        show.note(f"{what}; with diffusers: {made.use}")
        show.lines([show.full(made.path)])
