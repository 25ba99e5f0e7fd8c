"""Whether a policy holds, here and on this base: every reason why it does not is found and told."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from policies import BASE, HEX, PRINTS, Handle, change, erasure, locked, stored

import conceptzap
from conceptzap import format
from conceptzap.edit import Erasure
from conceptzap.errors import RefusedError
from conceptzap.trust import policy


@pytest.fixture
def lock(tmp_path) -> Path:
    return locked(tmp_path)


def test_a_policy_holds_when_nothing_was_touched(lock):
    read = policy.read(lock)
    assert policy.faults(read) == []
    assert policy.verify_files(read) == [lock.parent / f"{n}{format.SUFFIX}" for n in "ab"]


def refused(lock: Path) -> list[str]:
    read = policy.read(lock)
    reasons = policy.faults(read)
    with pytest.raises(RefusedError) as caught:
        policy.verify_files(read)
    assert caught.value.exit_code == 6 and "\n" not in str(caught.value)
    assert all(reason in str(caught.value) for reason in reasons)
    return reasons


def test_every_reason_is_told_at_once(lock):
    (lock.parent / f"a{format.SUFFIX}").unlink()
    stored(lock.parent, "dog", name="b")
    change(lock, ">=0.1.0,<0.2", ">=7")
    version, missing, other = refused(lock)
    assert version == f"this is conceptzap {conceptzap.__version__}, it asks for >=7"
    assert "no such file" in missing and "not the file that was locked" in other


def test_every_flipped_bit_of_a_file_is_noticed(lock):
    path = lock.parent / f"a{format.SUFFIX}"
    good, read = path.read_bytes(), policy.read(lock)
    for index in range(0, len(good), 7):
        path.write_bytes(good[:index] + bytes([good[index] ^ 1 << index % 8]) + good[index + 1 :])
        assert policy.faults(read), index


@pytest.mark.parametrize("what", ["folder", "pipe", "dangling", "empty"])
def test_what_is_no_file_does_not_hold(lock, what):
    path = lock.parent / f"a{format.SUFFIX}"
    path.unlink()
    make = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "dangling": lambda: path.symlink_to("nowhere"),
        "empty": path.touch,
    }
    make[what]()
    assert len(refused(lock)) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"role": "key"}, "role 'key'"),
        ({"scale": 2.0}, "strength 2, not 1"),
        ({"base": dataclasses.replace(BASE, signature="6" * 64)}, "another architecture"),
        (
            {"base": dataclasses.replace(BASE, fingerprint=PRINTS | {"attn2": "1" * 64})},
            "checkpoint",
        ),
    ],
)
def test_a_lock_written_by_hand_cannot_let_them_in(lock, changes, reason):
    old = policy.read(lock).files[1]
    path = stored(lock.parent, name="b", **changes)
    change(lock, old.sha256, hashlib.sha256(path.read_bytes()).hexdigest())
    change(lock, old.digest, format.read_header(path).digest)
    assert [reason in told for told in refused(lock)] == [True]


def test_a_lock_written_by_hand_cannot_rename_a_concept(lock):
    change(lock, '"church"', '"nudity"')
    assert refused(lock) == [f"a{format.SUFFIX} is about church"]


def test_a_lock_written_by_hand_cannot_change_a_digest(lock):
    change(lock, policy.read(lock).files[0].digest, HEX)
    assert "has the digest" in refused(lock)[0]


def test_a_file_that_is_not_required_may_be_absent_but_not_another(lock):
    church = 'concepts = [\n    "church",\n]\nrequired = '
    change(lock, f"{church}true", f"{church}false")
    read, path = policy.read(lock), lock.parent / f"a{format.SUFFIX}"
    assert len(policy.verify_files(read)) == 2
    path.unlink()
    assert policy.verify_files(read) == [lock.parent / f"b{format.SUFFIX}"]
    assert len(policy.enforce(read, Handle())) == 1
    path.write_bytes(b"another")
    assert len(refused(lock)) == 1


@pytest.mark.parametrize(
    ("version", "holds"),
    [("0.1.0", True), ("0.1.9", True), ("0.2.0", False), ("0.2.0rc1", False), ("0.0.9", False)],
)
def test_the_version_has_to_be_in_the_range(lock, monkeypatch, version, holds):
    read = policy.read(lock)
    monkeypatch.setattr(conceptzap, "__version__", version)
    assert (policy.faults(read) == []) is holds


@pytest.mark.parametrize(
    ("version", "wanted"),
    [("0.3.2", ">=0.3.2,<0.4"), ("1.2.0", ">=1.2.0,<2"), ("0.1.0rc1", ">=0.1.0rc1,<0.2")],
)
def test_the_range_holds_for_the_version_that_wrote_it(tmp_path, monkeypatch, version, wanted):
    monkeypatch.setattr(conceptzap, "__version__", version)
    written = policy.write(tmp_path / "x.lock", BASE, "demo", [stored(tmp_path)])
    assert written.versions == wanted
    assert policy.faults(written) == []


@pytest.mark.parametrize("part", policy.PARTS)
def test_another_checkpoint_is_refused(lock, part):
    other = dataclasses.replace(BASE, fingerprint=PRINTS | {part: "9" * 64})
    with pytest.raises(RefusedError, match=f"its {part} weights are others"):
        policy.check_base(policy.read(lock), Handle(other))


def test_another_architecture_is_refused(lock):
    other = dataclasses.replace(BASE, signature="9" * 64)
    with pytest.raises(RefusedError, match="another architecture"):
        policy.check_base(policy.read(lock), Handle(other))


def test_a_real_base_is_told_from_one_with_a_single_changed_weight(tmp_path):
    from conceptzap.testing import tiny

    base, other = tiny(), tiny()
    ref = base.reference(policy.EVERYTHING)
    written = policy.write(tmp_path / "x.lock", ref, "tiny", [stored(tmp_path, base=ref)])
    policy.check_base(written, base)
    with torch.no_grad():
        other.unet.conv_in.weight[0, 0, 0, 0] += 1
    with pytest.raises(RefusedError, match="its unet weights are others"):
        policy.check_base(written, other)


def test_enforce_gives_the_erasures_that_were_locked(lock):
    read = policy.read(lock)
    assert [e.digest for e in policy.enforce(read, Handle())] == [p.digest for p in read.files]


def test_enforce_notices_an_exchange_after_the_check(lock, monkeypatch):
    read, load = policy.read(lock), format.load

    def exchanged(path: Path) -> Erasure:
        stored(lock.parent, "dog", name="a")
        return load(path)

    monkeypatch.setattr(format, "load", exchanged)
    with pytest.raises(RefusedError, match="dog is not in it"):
        policy.enforce(read, Handle())


def test_enforce_notices_a_file_that_goes_after_the_check(lock, monkeypatch):
    read, load = policy.read(lock), format.load

    def gone(path: Path) -> Erasure:
        path.unlink()
        return load(path)

    monkeypatch.setattr(format, "load", gone)
    with pytest.raises(RefusedError, match="no such file"):
        policy.enforce(read, Handle())


def test_only_what_is_pinned_may_be_in_force(lock):
    read = policy.read(lock)
    church, gogh = policy.enforce(read, Handle())
    policy.check_erasures(read, [gogh, church])
    for given_erasures, reason in [
        ([church], f"b{format.SUFFIX} is not in force"),
        ([], "is not in force"),
        ([church, gogh, erasure("dog")], "dog is not in it"),
        ([church, gogh.scaled(0.5)], "Van Gogh has the strength 0.5"),
        ([church, gogh.scaled(0)], "Van Gogh has the strength 0"),
        (
            [church, gogh, erasure("Van Gogh", role="key")],
            "Van Gogh holds an edit of the role 'key'",
        ),
    ]:
        with pytest.raises(RefusedError) as caught:
            policy.check_erasures(read, given_erasures)
        assert reason in str(caught.value)


def test_verifying_needs_no_torch(lock):
    code = (
        "import sys; from pathlib import Path; from conceptzap.trust import policy;"
        "policy.verify_files(policy.read(Path(sys.argv[1]))); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(lock)], check=True, timeout=60)
