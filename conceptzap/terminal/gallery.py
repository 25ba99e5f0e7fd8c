"""Where drawn pictures go: names, and the sheet that puts base and erased side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conceptzap.errors import UsageError
from conceptzap.format import atomic, naming

FOLDER = Path("images")
SHEET, STRIP = "compare", "sweep"
COLUMNS = 6  # pictures side by side on a sheet
SIDE = 128  # pixels a small picture is enlarged to on a sheet


@dataclass
class Gallery:
    """One PNG, or a folder that gets one PNG a picture.

    `output` ending in .png is a file and holds exactly one picture; None is `images/` here. `kind`
    says what all pictures are put on together: "" for nothing, `SHEET` beside them, `STRIP` instead.
    `check()` raises `UsageError` or `ResourceError` before anything is drawn.
    """

    output: Path | None
    count: int
    force: bool = False
    kind: str = ""
    taken: set[Path] = field(default_factory=set)

    @property
    def single(self) -> bool:
        output = self.output
        return output is not None and output.suffix.lower() == ".png" and not output.is_dir()

    @property
    def sheet(self) -> Path:
        """The sheet: beside the single picture, or in the folder under a free name."""
        if self.single and self.kind == STRIP:
            return self.output
        if self.single:
            return self.output.with_name(f"{self.output.stem}-{self.kind}.png")
        folder, count = self.output or FOLDER, 1
        path = folder / f"{self.kind}.png"
        while path.exists() and not self.force:
            count += 1
            path = folder / f"{self.kind}-{count}.png"
        return path

    def check(self) -> None:
        """Check, before anything is drawn, that the results can be written."""
        if not self.single:
            _check_folder(self.output or FOLDER)
            return
        if self.count != 1 and self.kind != STRIP:
            raise UsageError(
                f"{self.count} pictures do not fit into {self.output}", "give a folder to --output"
            )
        atomic.check_writable(self.output, self.force)
        if self.kind:
            atomic.check_writable(self.sheet, self.force)

    def save(self, pictures: Iterable[Any]) -> Iterator[tuple[Path, Any]]:
        """Write each picture as it comes; yields its path with it."""
        from conceptzap.format.pictures import save_png

        for picture in pictures:
            path = self._name(picture)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(path, picture.array, picture.text, force=self.force)
            yield path, picture

    def _name(self, picture: Any) -> Path:
        if self.single:
            return self.output
        folder = self.output or FOLDER
        return naming.picture_path(folder, picture.prompt, picture.seed, self.taken, self.force)


def _check_folder(folder: Path) -> None:
    near = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not near.is_dir():
        raise UsageError(f"{near} is not a folder", "name a folder or a .png to --output")
    atomic.check_writable(near / "picture.png", force=True)


def compare_sheet(original: Sequence[Any], erased: Sequence[Any], path: Path, force: bool) -> Path:
    """Write same-seed pairs, the original's over the erased; prompts and seeds under the columns."""
    from conceptzap.format.pictures import Block

    blocks = []
    for start in range(0, len(original), COLUMNS):
        chunk = slice(start, start + COLUMNS)
        rows = [("original", original[chunk]), ("erased", erased[chunk])]
        under = [f"{one.prompt}\nseed {one.seed}" for one in original[chunk]]
        blocks.append(Block((), [(label, [one.array for one in row]) for label, row in rows], under))
    used = [one for one in erased[0].erasures if one["strength"]]
    title = f"original and without {_named(used)}" if used else "original, twice: nothing is erased"
    _save_sheet(path, title, blocks, erased, {}, force)
    return path


def sweep_sheet(
    strengths: Sequence[float], drawn: Sequence[Sequence[Any]], path: Path, force: bool
) -> Path:
    """Write one strip a picture, weak to strong: `drawn` has, for each strength, the same pictures."""
    from conceptzap.format.pictures import Block

    rows = [
        (f"{same[0].prompt}, seed {same[0].seed}", [one.array for one in same])
        for same in zip(*drawn, strict=True)
    ]
    captions = [f"{strength:g}" for strength in strengths]
    title = f"{_named(drawn[0][0].erasures, ())} by strength"
    told = {"strengths": json.dumps(list(strengths))}
    _save_sheet(path, title, [Block(captions, rows)], drawn[0], told, force)
    return path


def _named(erasures: Iterable[Mapping[str, Any]], usual: Sequence[float] = (1,)) -> str:
    """`van-gogh, church at 0.5`: erasures by their files, with strengths that are not the `usual`."""
    names = []
    for one in erasures:
        name = naming.bare(Path(one["path"]).name) if one["path"] else one["digest"][:12]
        plain = not usual or one["strength"] in usual
        names.append(name if plain else f"{name} at {one['strength']:g}")
    return ", ".join(names)


def _save_sheet(
    path: Path,
    title: str,
    blocks: Sequence[Any],
    pictures: Sequence[Any],
    told: Mapping[str, str],
    force: bool,
) -> None:
    """A sheet whose PNG says what its pictures' own say of their run, with all prompts and seeds."""
    from conceptzap.format.pictures import contact_sheet, save_png

    own = ("prompt", "seed", "parameters", "erasures")
    text = {key: value for key, value in pictures[0].text.items() if key not in own}
    used = [{key: one[key] for key in ("digest", "strength")} for one in pictures[0].erasures]
    if "strengths" in told:  # those of the columns
        used = [{"digest": one["digest"]} for one in used]
    text |= {
        "title": title,
        "prompts": json.dumps([one.prompt for one in pictures]),
        "seeds": json.dumps([one.seed for one in pictures]),
        "erasures": json.dumps(used),
        **told,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, contact_sheet(title, blocks, _scale(pictures)), text, force)


def sheet(
    rows: Sequence[tuple[str, Sequence[str]]], pictures: Iterable[Any], path: Path, force: bool
) -> None:
    """Write one sheet of labelled rows of prompts; `pictures` come in the order of the prompts."""
    from conceptzap.format.pictures import save_png, side_by_side

    drawn = list(pictures)
    following = iter(drawn)
    grid = [(label, [next(following).array for _ in prompts]) for label, prompts in rows]
    save_png(path, side_by_side(grid, _scale(drawn)), {"title": "what the base draws"}, force)


def _scale(pictures: Sequence[Any]) -> int:
    return max(1, SIDE // pictures[0].array.shape[0])
