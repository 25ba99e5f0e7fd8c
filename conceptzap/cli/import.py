"""Make an erasure of a LoRA, SPM, UCE, ESD or CPE file.

    conceptzap import leco-van-gogh.safetensors --concept "Van Gogh"
    conceptzap import uce.safetensors --base ./sd-v1-4 --concept church -o church

What kind of file it is shows in its keys; the base must be the one that it was made for, and all of the
file must fit. At the end: whether the concept is gone, as `erase` measures it, the scores, and a picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptzap.cli import _options as options
from conceptzap.registry import family
from conceptzap.task import KINDS

FORMATS = list(family.files("imports"))  # those that other packages bring are completed


def _formats(incomplete: str) -> list[str]:
    return [name for name in family.members("imports") if name.startswith(incomplete)]


def _kinds(incomplete: str) -> list[str]:
    return [kind for kind in KINDS if kind.startswith(incomplete)]


def run(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", show_default=False, parser=options.path,
                       help="A .safetensors file, or a PEFT folder. Pickles are never read."),
    ],
    concept: Annotated[
        list[str] | None,
        typer.Option("--concept", "-c", metavar="C", help="What it erases.  [default: as the file says]"),
    ] = None,
    anchor: Annotated[
        list[str] | None,
        typer.Option("--anchor", metavar="A", help="What it becomes, where that is known."),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", metavar="K", autocompletion=_kinds,
                     help=f"{', '.join(KINDS)}: one for all, or one each.  [default: guessed]"),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", metavar="F", autocompletion=_formats,
                     help=f"{', '.join(FORMATS)}.  [default: by its keys]"),
    ] = None,
    base: options.Base = "demo",
    prediction: options.Prediction = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", parser=options.path,
                     help="[default: <concept>.lprompt.safetensors]"),
    ] = None,
    force: options.Force = False,
    preview: Annotated[
        bool, typer.Option("--preview/--no-preview", help="A before/after picture beside the file.")
    ] = True,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import api
    from conceptzap.errors import ThresholdError
    from conceptzap.terminal import show
    from conceptzap.terminal.progress import Progress

    failed = None
    try:
        made = api.import_(
            file, options.words(concept), anchors=options.words(anchor), kind=options.words(kind),
            form=form, base=base, prediction=prediction, seed=seed, device=device, dtype=dtype,
            output=output, force=force, preview=preview, report=Progress(),
        )  # fmt: skip
    except ThresholdError as error:
        made, failed = error.made, error
    if not as_json:
        show.erased(made, made.erasure.header.concepts[0], base)
    elif not failed:
        show.emit("import", show.erased_record(made))
    if failed:
        raise failed
