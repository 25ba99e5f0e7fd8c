"""The header's tree as a file stores it: each list of sites once, in a table, and no defaults. No torch.

Layout 2, which is written: `sites` is a table of folded lists, an edit names one by its number, a
self-test lists its numbers in the order of its edits' sites. Layout 1, which is still read, spelt
every list out where it was used. `expand` takes either to the tree that `tree` reads; `compact`
goes back. A folded list is exact: `unet.down_blocks.{0,1}.attn2` is two paths, as in a shell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping

from conceptzap.edit import Json
from conceptzap.errors import FormatError, escape
from conceptzap.format.tree import TEST, TEST_MORE
from conceptzap.format.typed import GET_AGAIN, NEWER, mapping, sequence, texts, whole

LAYOUT = 2
# what an edit has unless it says otherwise
DEFAULTS: dict[str, Json] = {"gates": [], "params": {}, "role": "erase", "scale": 1.0}
# a table of few bytes must not unfold into more paths than a file can need
TABLE_LIMIT = 2**16
USES_LIMIT = 2**20
PATH_LIMIT = 255

Path = tuple[tuple[str, ...], ...]  # for each part of a path, the names that may stand there


def fold(sites: Iterable[str]) -> list[str]:
    """Patterns for a set of module paths: those that differ in one part become one, last part first.

    A last pattern that begins with a dot is how all the others end.
    """
    found: set[Path] = {tuple((part,) for part in site.split(".")) for site in sites}
    for place in reversed(range(max(map(len, found), default=0))):
        alike: dict[tuple[Path, Path], set[str]] = {}
        for path in found:
            if place < len(path):
                alike.setdefault((path[:place], path[place + 1 :]), set()).update(path[place])
        merged = {(*head, tuple(sorted(names)), *tail) for (head, tail), names in alike.items()}
        found = merged | {path for path in found if place >= len(path)}
    ending = _shared_end(found)
    starts = [path[: len(path) - len(ending)] for path in found]
    end = ["." + ".".join(map(_spelt, ending))] if ending else []
    return sorted(".".join(map(_spelt, path)) for path in starts) + end


def _shared_end(paths: Collection[Path]) -> Path:
    """The parts in which all of several paths end, short of a whole path."""
    if len(paths) < 2:
        return ()
    columns = zip(*(path[:0:-1] for path in paths), strict=False)  # from the last part to the second
    same = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    return tuple(column[0] for column in same)[::-1]


def _spelt(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{{{','.join(names)}}}"


def unfold(patterns: Collection[str], limit: int = TABLE_LIMIT) -> list[str]:
    """All module paths of the patterns, sorted; `FormatError` for more than `limit`, or endless ones."""
    sites: set[str] = set()
    starts = [pattern for pattern in patterns if not pattern.startswith(".")]
    end = "".join(pattern for pattern in patterns if pattern.startswith("."))
    for pattern in starts:
        parts = [part.strip("{}").split(",") for part in f"{pattern}{end}".split(".")]
        longest = sum(1 + max(map(len, names)) for names in parts)
        if len(sites) + math.prod(map(len, parts)) > limit or longest > PATH_LIMIT:
            raise FormatError(f"it unfolds into too many module paths: {escape(pattern)}", GET_AGAIN)
        sites.update(map(".".join, itertools.product(*parts)))
    return sorted(sites)


def compact(tree: Mapping[str, Json]) -> dict[str, Json]:
    """The tree as layout 2 stores it; `FormatError` for a self-test that is none."""
    if idle := [name for name, test in tree["canary"].items() if set(test) - TEST_MORE != TEST]:
        raise FormatError(f"the self-test {escape(idle[0])!r} does not hold {sorted(TEST)}", "make it again")
    sites = {name: edit["sites"] for name, edit in tree["edits"].items()}
    apart = {name: _apart(test, sites) for name, test in tree["canary"].items()}
    lists = {tuple(one) for one in (*sites.values(), *apart.values()) if one is not None}
    spelt = {one: fold(one) for one in lists}  # sites -> patterns
    table = sorted({tuple(patterns) for patterns in spelt.values()})
    number = {patterns: index for index, patterns in enumerate(table)}
    index = {one: number[tuple(patterns)] for one, patterns in spelt.items()}
    edits = {}
    for name, edit in tree["edits"].items():
        said = {key: value for key, value in edit.items() if DEFAULTS.get(key) != value}
        edits[name] = said | {"sites": index[tuple(edit["sites"])]}
    canary = {}
    for name, test in tree["canary"].items():
        own = apart[name]
        numbers = {"change": [test["change"][site] for site in sorted(test["change"])]}
        canary[name] = test | numbers | ({} if own is None else {"sites": index[tuple(own)]})
    listed = [list(patterns) for patterns in table]
    return {**tree, "canary": canary, "edits": edits, "layout": LAYOUT, "sites": listed}


def _apart(test: Mapping[str, Json], sites: Mapping[str, list[str]]) -> list[str] | None:
    """The sites of a self-test, unless they are those of its edits."""
    named = sorted(test["change"])
    return None if named == _together(test["edits"], sites) else named


def _together(names: Iterable[str], sites: Mapping[str, list[str]]) -> list[str]:
    return sorted({site for name in names for site in sites.get(name, ())})


def expand(stored: Json) -> tuple[dict[str, Json], int]:
    """The full tree of a stored one, and its layout; raises `FormatError` for an unknown layout."""
    tree = dict(mapping(stored, "the header"))
    layout = tree.pop("layout", 1)
    if type(layout) is not int or layout not in (1, LAYOUT):
        raise FormatError(f"its layout {escape(layout)} is unknown", NEWER)
    if layout == LAYOUT:
        table = _Table(tree.pop("sites", None))
        edits = mapping(tree.get("edits"), "edits")
        tree["edits"] = {name: table.edit(name, edit) for name, edit in edits.items()}
        tests = mapping(tree.get("canary"), "canary")
        tree["canary"] = {name: table.test(name, test) for name, test in tests.items()}
    return tree, layout


class _Table:
    """The lists of sites of a file, and how many more may be read from them."""

    def __init__(self, stored: Json) -> None:
        self.lists: list[list[str]] = []
        self.left = USES_LIMIT
        self.sites: dict[str, list[str]] = {}  # edit -> where it acts
        room = TABLE_LIMIT
        for patterns in sequence(stored, "sites"):
            self.lists.append(unfold(texts(patterns, "sites"), room))
            room -= len(self.lists[-1])

    def edit(self, name: str, stored: Json) -> dict[str, Json]:
        record = mapping(stored, f"edit {escape(name)}")
        self.sites[name] = self._at(record.get("sites"), f"edit {escape(name)}")
        return {**DEFAULTS, **record, "sites": self.sites[name]}

    def test(self, name: str, stored: Json) -> dict[str, Json]:
        where = f"canary {escape(name)}"
        test = dict(mapping(stored, where))
        if "sites" in test:
            sites = self._at(test.pop("sites"), where)
        else:
            names = set(texts(test.get("edits"), f"{where}: edits"))
            self._use(sum(len(self.sites.get(one, ())) for one in names))
            sites = _together(names, self.sites)
        numbers = sequence(test.get("change"), f"{where}: change")
        if len(numbers) != len(sites):
            raise FormatError(f"{where} has {len(numbers)} numbers for {len(sites)} sites", GET_AGAIN)
        return {**test, "change": dict(zip(sites, numbers, strict=True))}

    def _at(self, number: Json, where: str) -> list[str]:
        sites = self.lists[whole(number, f"{where}: sites", 0, len(self.lists) - 1)]
        self._use(len(sites))
        return sites

    def _use(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise FormatError(f"its edits act at more than {USES_LIMIT} places in all", GET_AGAIN)
