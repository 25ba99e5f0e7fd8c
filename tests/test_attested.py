"""Results of attacks in a policy: of these very files, on this base, under their limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from policies import BASE, stored

from conceptzap import api, format
from conceptzap.errors import RefusedError, UsageError
from conceptzap.trust import policy


def subject(files: list[Path], concepts: list[str]) -> dict[str, Any]:
    return {
        "files": [{"digest": format.load(file).digest, "strength": 1.0} for file in files],
        "concepts": concepts,
    }


def result(folder: Path, files: list[Path], rate: float = 0.05, **changes: Any) -> Path:
    """What `conceptzap attack` writes, as far as a policy reads it."""
    said = {"value": rate, "low": 0.0, "high": 1.0, "n": 20}
    record = {
        "schema": "conceptzap.attack/1", "attack": "inversion",
        "control": False, "subject": subject(files, [c for f in files for c in format.load(f).header.concepts]),
        "base": {"fingerprint": dict(BASE.fingerprint)}, "asr": said, "before": said, "newly": said,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(record | changes))
    return folder


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    stored(tmp_path)
    stored(tmp_path, "church", name="b")
    return sorted(tmp_path.glob(f"*{format.SUFFIX}"))


def locked(files: list[Path], *results: Path, most: float = 0.1) -> policy.Policy:
    lock = files[0].parent / "conceptzap.lock"
    return policy.write(lock, BASE, "demo", files, True, None, results, {"ASR": most})


def test_a_result_is_pinned_and_asked_for(files: list[Path], tmp_path: Path) -> None:
    found = result(tmp_path / "attacked", files)
    read = policy.read(locked(files, found).path)
    one, = read.attacks
    assert (one.path, one.attack, one.limits) == ("attacked/result.json", "inversion", {"ASR": 0.1})
    assert not policy.faults(read)
    (found / "result.json").write_text((found / "result.json").read_text().replace("0.05", "0.06"))
    assert policy.faults(read) == ["attacked/result.json is not the result that was locked (sha256)"]
    (found / "result.json").unlink()
    with pytest.raises(RefusedError, match="attacked/result.json"):
        policy.verify_files(read)


def test_a_limit_that_is_lowered_by_hand_is_held_to(files: list[Path], tmp_path: Path) -> None:
    lock = locked(files, result(tmp_path / "attacked", files)).path
    lock.write_text(lock.read_text().replace("ASR = 0.1", "ASR = 0.01"))
    said, = policy.faults(policy.read(lock))
    assert said == "attacked/result.json: ASR of inversion is 5.0% of 20, over 1.0%"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rate": 0.2}, "ASR of inversion is 20.0% of 20, over 10.0%"),
        ({"base": {"fingerprint": {}}}, "attacked another base"),
        ({"subject": {"files": [], "concepts": []}}, "attacked other files"),
        ({"only": ["transfer"]}, "left forms of inversion out"),
        ({"control": True}, "is a control, inversion, and no attack"),
    ],
)
def test_what_shows_too_little_is_not_locked(
    files: list[Path], tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(RefusedError, match=told):
        locked(files, result(tmp_path / "attacked", files, **changes))


def test_a_result_that_asks_for_something_else_shows_nothing(files: list[Path], tmp_path: Path) -> None:
    """Erased is what nobody asked for: it is not seen, however weak the erasure."""
    with pytest.raises(RefusedError, match="did not ask for church"):
        locked(files, result(tmp_path / "attacked", files, subject=subject(files, ["cat", "Van Gogh"])))
    named = subject(files, ["temple", "Van Gogh"]) | {"words": {"temple": ["temple", "Church"]}}
    locked(files, result(tmp_path / "attacked", files, subject=named))  # by another word for the same


@pytest.mark.parametrize("words", [None, ["a"], {"church": [1]}, {"church": 1}])
def test_words_that_are_none_are_no_result(files: list[Path], tmp_path: Path, words: Any) -> None:
    said = subject(files, ["church", "Van Gogh"]) | {"words": words}
    with pytest.raises(UsageError, match="no result of an attack"):
        locked(files, result(tmp_path / "attacked", files, subject=said))


def test_a_result_of_one_file_says_nothing_of_two(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="attacked other files"):
        locked(files, result(tmp_path / "attacked", files[:1]))


NONE = (b"", b"[]", b"{}", b'{"schema": "conceptzap.result/1"}', b"\xff", b"[" * 9999)


@pytest.mark.parametrize("data", NONE)
def test_what_is_no_result_is_a_usage_error(files: list[Path], tmp_path: Path, data: bytes) -> None:
    (tmp_path / "result.json").write_bytes(data)
    with pytest.raises(UsageError, match="no result of an attack"):
        locked(files, tmp_path / "result.json")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("ASR = 0.1", "E = 0.1", "not of ASR"), ("ASR = 0.1", "ASR = 2", "no shares"),
        ("ASR = 0.1", "ASR = true", "no shares"), ('attack = "inversion"', "attack = 1", "not of type str"),
        ('path = "attacked', 'path = "/attacked', "no path from"), ('sha256 = "', 'sha256 = "x', "64 hex"),
    ],
)  # fmt: skip
def test_a_malformed_table_is_a_usage_error(
    files: list[Path], tmp_path: Path, old: str, new: str, told: str
) -> None:
    lock = locked(files, result(tmp_path / "attacked", files)).path
    head, attacks = lock.read_text().split("[[attacks]]")
    lock.write_text(head + "[[attacks]]" + attacks.replace(old, new))
    with pytest.raises(UsageError, match=told):
        policy.read(lock)


def test_results_and_limits_come_together(files: list[Path]) -> None:
    for given in ({"attacked": files[0]}, {"fail_over": ["ASR=1"]}):
        with pytest.raises(UsageError, match="come together"):
            api.lock(files, **given)
