"""The folder of an attack: result.json, report.html with what came through, every try, what was found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from safetensors.torch import save

from conceptzap.format import atomic, naming
from conceptzap.format.pictures import save_png, side_by_side
from conceptzap.page import folder, report
from conceptzap.redteam.outcome import Attacked
from conceptzap.redteam.trial import Trial

RESULT, REPORT, ATTEMPTS, FOUND, IMAGES = (
    "result.json", "report.html", "attempts.csv", "found.safetensors", "images",
)  # fmt: skip
THROUGH = "through.png"  # among the images: what came through under the worst form, for a bench's page
FEW = 8  # pictures of it
SHOWN = 16  # pictures of a form, those that came through first
PICTURE = 96  # pixels a picture has at least on a sheet
COLUMNS = (
    "concept", "prompt", "seed", "form", "base", "before", "through", "tries", "edit open",
    "found", "found seed", "base by the form",
)  # fmt: skip
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Tried:
    """One probe under one form: its pictures uint8 [h, w, 3], and whether the last one shows the concept.

    `found`: the prompt that brought it through, `seed` of the attacked picture; `open`: was any edit ever
    open in that.
    """

    prompt: str
    seed: int
    plain: np.ndarray
    attacked: np.ndarray
    through: bool
    open: bool
    tries: int
    found: str


def tried(trials: Sequence[Trial], name: str) -> list[Tried]:
    """What a form came to at every probe that it was tried at, what came through first."""
    found = [
        Tried(probe.prompt, count.seeds.get(row, probe.seed), trial.plain[row], count.pictures[row],
              bool(count.through[row]), count.fired[row], int(count.tries[row]), count.prompts.get(row, ""))
        for trial in trials if (count := trial.counts.get(name))
        for row, probe in enumerate(trial.victim.probes) if row in count.pictures
    ]  # fmt: skip
    return sorted(found, key=lambda one: not one.through)


def html(done: Attacked) -> str:
    """The whole page; it fetches nothing and runs nothing."""
    environment = report.templates()
    return environment.get_template("attack.html.j2").render(
        policy=POLICY,
        style=Markup(environment.loader.get_source(environment, "style.css")[0]),
        done=done,
        forms=[(form, tried(done.trials, form.name)) for form in done.forms],
        shown=SHOWN,
    )


def prepare(place: Path, force: bool) -> Path:
    """The folder itself, once it is known that a result can be written there; see `folder.prepare`."""
    return folder.prepare(place, force, (RESULT, REPORT, ATTEMPTS, FOUND, IMAGES))


def write(done: Attacked, place: Path, force: bool) -> dict[str, Path]:
    """Page, pictures, attempts, what was found, and last the result; nothing of an earlier one stays."""
    record = json.dumps(done.record(), indent=1, sort_keys=True, allow_nan=False) + "\n"
    files = {ATTEMPTS: folder.rows(_attempts(done.trials)).encode(), REPORT: html(done).encode()}
    if found := _found(done.trials):
        files[FOUND] = save(found)
    place.mkdir(parents=True, exist_ok=True)
    with atomic.hidden_folder(place / IMAGES) as hidden:
        _draw(done, hidden / IMAGES)
        for name, data in (files | {RESULT: record.encode()}).items():
            atomic.write_atomic(hidden / name, data)
        atomic.put_entries(hidden, prepare(place, force), RESULT, stale=(FOUND,))
    names = {Path(name).stem: place / name for name in (*files, RESULT)}
    return {"folder": place, **names}


def _draw(done: Attacked, images: Path) -> None:
    """A sheet for each form, and one of what came through."""
    images.mkdir()
    about = {"attack": str(done.about["attack"])}
    sheets = {naming.slug(f.name): (f.name, tried(done.trials, f.name)[:SHOWN]) for f in done.forms}
    through = [one for trial, name in done.worst_of for one in tried([trial], name) if one.through]
    sheets[Path(THROUGH).stem] = done.worst.name, through[:FEW]
    for stem, (form, shown) in sheets.items():
        if (sheet := _sheet(shown)) is not None:
            save_png(images / f"{stem}.png", sheet, {**about, "form": form})


def _sheet(found: Sequence[Tried]) -> Any:
    """Unattacked above attacked; None where nothing was drawn."""
    if not found:
        return None
    scale = max(1, PICTURE // max(found[0].plain.shape[:2]))
    rows = ("unattacked", [one.plain for one in found]), ("attacked", [one.attacked for one in found])
    return side_by_side(rows, scale)


def _attempts(trials: Sequence[Trial]) -> Iterator[Sequence[object]]:
    """One line a probe and form."""
    yield COLUMNS
    for trial in trials:
        for name, count in trial.counts.items():
            for row, probe in enumerate(trial.victim.probes):
                seen = [int(flags[row]) for flags in (trial.base, trial.before, count.through)]
                spent = [int(count.tries[row]), int(count.fired.get(row, False))]
                asked = [trial.victim.target.name, probe.prompt, probe.seed, name]
                meant = "" if count.meant is None else int(count.meant[row])
                yield [*asked, *seen, *spent, count.prompts.get(row, ""), count.seeds.get(row, ""), meant]


def _found(trials: Sequence[Trial]) -> dict[str, Any]:
    """`concept/form/round/name` -> what was found, whatever it is; no two share memory."""
    return {
        f"{trial.victim.target.name}/{name}/{number}/{key}": tensor.detach().cpu().contiguous().clone()
        for trial in trials
        for name, count in trial.counts.items()
        for number, found in enumerate(count.found, 1)
        for key, tensor in found.items()
    }
