"""Where drawn pictures go: names, and the sheet that puts base and erased side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conceptzap.errors import UsageError
from conceptzap.format import atomic, naming

FOLDER = Path("images")
SHEET = "compare.png"
SIDE = 128  # pixels a small picture is enlarged to on a sheet


@dataclass
class Gallery:
    """One PNG, or a folder that gets one PNG a picture.

    `output` ending in .png is a file and holds exactly one picture; None is `images/` here.
    `check()` raises `UsageError` or `ResourceError` before anything is drawn.
    """

    output: Path | None
    count: int
    force: bool = False
    taken: set[Path] = field(default_factory=set)

    @property
    def single(self) -> bool:
        output = self.output
        return output is not None and output.suffix.lower() == ".png" and not output.is_dir()

    @property
    def sheet(self) -> Path:
        """The comparison: beside the single picture, or in the folder under a free name."""
        if self.single:
            return self.output.with_name(f"{self.output.stem}-{SHEET}")
        folder, count = self.output or FOLDER, 1
        path = folder / SHEET
        while path.exists() and not self.force:
            count += 1
            path = folder / f"compare-{count}.png"
        return path

    def check(self, compare: bool = False) -> None:
        """Check, before anything is drawn, that the results can be written."""
        if not self.single:
            _check_folder(self.output or FOLDER)
            return
        if self.count != 1:
            raise UsageError(
                f"{self.count} pictures do not fit into {self.output}", "give a folder to --output"
            )
        atomic.check_writable(self.output, self.force)
        if compare:
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


def compare_sheet(base: Sequence[Any], erased: Sequence[Any], path: Path, force: bool) -> Path:
    """Write same-seed pairs: for each prompt a row of the base's and one of the erased."""
    from conceptzap.format.pictures import save_png, side_by_side

    rows = []
    for prompt in dict.fromkeys(picture.prompt for picture in base):
        rows.append((f"base: {prompt}", [one.array for one in base if one.prompt == prompt]))
        rows.append(("erased", [one.array for one in erased if one.prompt == prompt]))
    title = {"title": "base and erased, same seeds"}
    save_png(path, side_by_side(rows, _scale(base)), title, force)
    return path


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
