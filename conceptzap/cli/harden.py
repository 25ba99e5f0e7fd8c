"""Attack an erasure, and give it a gate that looks at pictures.

    conceptzap harden van-gogh
    conceptzap harden van-gogh --budget quick -o van-gogh-looks

Tokens that were learned, and descriptions, open no gate that reads the text: this one opens when the
picture turns to the concept. Another reads the name written wrongly. The other gates and edits stay as they
are. `quick`, which `erase` does by itself on the built-in checkpoint, looks at the concept and at mixtures of
it; `full` also searches for what comes through, as attackers do, and learns from that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptzap.cli import _options as options


def run(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="An erasure.", show_default=False,
                       autocompletion=options._erasures),
    ],
    budget: Annotated[
        str, typer.Option("--budget", metavar="B", autocompletion=options._budgets, help="quick or full.")
    ] = "full",
    base: options.Base = "demo",
    prediction: options.Prediction = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", parser=options.path,
                     help="The file to write.  [default: FILE-hardened]"),
    ] = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import api
    from conceptzap.terminal import show
    from conceptzap.terminal.progress import Progress

    made = api.harden(
        file, budget, base, output=output, force=force, seed=seed, device=device, dtype=dtype,
        prediction=prediction, report=Progress(),
    )  # fmt: skip
    if as_json:
        record = {"path": show.full(made.path), "bytes": made.bytes, "digest": made.digest}
        show.emit("harden", {**record, "rounds": dict(made.rounds)})
        return
    for concept, rounds in made.rounds.items():
        pictures = zip(rounds["through"], rounds["n"], strict=True)
        through = ", ".join(f"{through} of {n}" for through, n in pictures)
        show.note(f"{concept}: came through, round by round: {through}")
    show.note(f"{show.size(made.bytes)}, digest {made.digest[:12]}")
    show.lines([show.full(made.path)])
