"""Default names of files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conceptzap.errors import UsageError
from conceptzap.format import naming


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Van Gogh", "van-gogh"),
        ("  a cat, by Monet! ", "a-cat-by-monet"),
        ("Hélène", "helene"),
        ("O'Keeffe", "o-keeffe"),
        ("ﬁsh №2", "fish-no2"),
        ("кошка", "d0bad0bed188d0bad0b0"),
        ("!", "21"),
        ("../../etc/passwd", "etc-passwd"),
        ("", ""),
    ],
)
def test_slug(text: str, expected: str) -> None:
    assert naming.slug(text) == expected


@given(st.text(min_size=1))
def test_every_slug_is_a_safe_name(text: str) -> None:
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,78}[a-z0-9]|[a-z0-9]", naming.slug(text))


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (None, "van-gogh-cat.lprompt.safetensors"),
        ("x", "x.lprompt.safetensors"),
        ("out/x.lprompt.safetensors", "out/x.lprompt.safetensors"),
        ("x.safetensors", "x.lprompt.safetensors"),
        ("v1.5", "v1.5.lprompt.safetensors"),
        ("out/", "out/van-gogh-cat.lprompt.safetensors"),
    ],
)
def test_erasure_path(output: str | None, expected: str) -> None:
    assert naming.erasure_path(["Van Gogh", "cat"], output) == Path(expected)


def test_an_existing_folder_gets_the_default_name_inside(tmp_path: Path) -> None:
    assert naming.erasure_path(["cat"], tmp_path) == tmp_path / "cat.lprompt.safetensors"


@pytest.mark.parametrize("output", [".lprompt.safetensors", "out/.safetensors"])
def test_an_output_without_a_name_is_refused(output: str) -> None:
    with pytest.raises(UsageError, match="has no name"):
        naming.erasure_path(["cat"], output)


def test_what_stands_beside_an_erasure() -> None:
    path = Path("out/cat.lprompt.safetensors")
    assert naming.key_path(path) == Path("out/cat.key.lprompt.safetensors")
    assert naming.preview_path(path) == Path("out/cat.png")


def test_pictures_count_where_a_name_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a-cat-3.png").touch()
    taken: set[Path] = set()
    names = [naming.picture_path(tmp_path, "a cat", 3, taken, force=False).name for _ in range(2)]
    assert names == ["a-cat-3-2.png", "a-cat-3-3.png"]
    assert naming.picture_path(tmp_path, "", 3, taken, force=False).name == "empty-3.png"


def test_force_takes_a_name_that_exists_but_never_its_own_twice(tmp_path: Path) -> None:
    (tmp_path / "a-cat-3.png").touch()
    taken: set[Path] = set()
    names = [naming.picture_path(tmp_path, "a cat", 3, taken, force=True).name for _ in range(2)]
    assert names == ["a-cat-3.png", "a-cat-3-2.png"]


def test_a_folder_is_no_name_where_nothing_gives_one(tmp_path: Path) -> None:
    for output in (tmp_path, "out/"):
        with pytest.raises(UsageError, match="is a folder"):
            naming.erasure_path((), output)


# names that leave something out


NAMES = ("a", "a.lprompt", "a.safetensors", "a.lprompt.safetensors")


@pytest.mark.parametrize("there", NAMES)
def test_a_name_is_taken_as_written_then_with_what_it_may_leave_out(
    there: str, tmp_path: Path
) -> None:
    (tmp_path / there).touch()
    meant = {name for name in NAMES if naming.existing(tmp_path / name) == tmp_path / there}
    assert there in meant
    if there == "a.lprompt.safetensors":
        assert meant == {"a", "a.lprompt", "a.lprompt.safetensors"}
    for name in set(NAMES) - meant:
        assert naming.existing(tmp_path / name) == tmp_path / name


def test_of_several_the_first_that_fits_is_meant(tmp_path: Path) -> None:
    for number in range(len(NAMES), 0, -1):
        (tmp_path / NAMES[number - 1]).touch()
    assert naming.existing(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").unlink()
    assert naming.existing(tmp_path / "a") == tmp_path / "a.safetensors"


def test_a_folder_does_not_hide_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert naming.existing(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a.lprompt.safetensors").touch()
    assert naming.existing(tmp_path / "a") == tmp_path / "a.lprompt.safetensors"


def test_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.lprompt.safetensors").touch()
    assert naming.existing("~/a") == tmp_path / "a.lprompt.safetensors"
    assert naming.erasure_path(["cat"], "~/b") == tmp_path / "b.lprompt.safetensors"
    assert naming.place("~/c.png") == tmp_path / "c.png" and naming.place("a~") == Path("a~")


@pytest.mark.parametrize("odd", ["a\0b", "\udcff", "x" * 300, "a/" * 3000])
def test_a_name_that_no_file_can_have_is_handed_back(odd: str) -> None:
    assert naming.existing(odd) == Path(odd) and not naming.is_erasure(odd)


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Van Gogh + church", "van-gogh+church"),
        ("church", "church"),
        ("a + castle (key)", "a+castle-key"),
        ("Van Gogh, church + dog", "van-gogh-church+dog"),
    ],
)
def test_a_stack_is_called_after_all_that_it_erases(title: str, expected: str) -> None:
    assert naming.stack_path(title) == Path(f"{expected}.lprompt.safetensors")


def test_the_name_of_a_large_stack_is_cut_and_tells_it_from_others() -> None:
    titles = [" + ".join(f"concept {n:03}" for n in range(count)) for count in (200, 201)]
    names = [str(naming.stack_path(title)) for title in titles]
    assert names[0] != names[1] and max(map(len, names)) <= 100
    assert names == [str(naming.stack_path(title)) for title in titles]
    assert all(re.fullmatch(r"[a-z0-9+-]+-[0-9a-f]{8}\.lprompt\.safetensors", name) for name in names)
