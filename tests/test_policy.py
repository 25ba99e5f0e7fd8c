"""`conceptzap.lock`: what it pins, what it refuses, and that its TOML says what was meant."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tomllib
from pathlib import Path

import pytest
from erasures import write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policies import BASE, HEX, PRINTS, change, locked, stored

from conceptzap import format
from conceptzap.base import load_base, opening
from conceptzap.edit import BaseRef
from conceptzap.errors import ConceptZapError, FormatError, RefusedError, UsageError
from conceptzap.testing import save_tiny
from conceptzap.trust import guard, lockfile, policy
from conceptzap.trust.lockfile import Pinned, Policy


@pytest.fixture
def lock(tmp_path) -> Path:
    return locked(tmp_path)


def test_what_is_written_is_read_again(lock):
    read = policy.read(lock)
    assert read.digest == hashlib.sha256(lock.read_bytes()).hexdigest()
    assert (read.base_name, read.base, read.versions) == ("demo", BASE, ">=0.1.0,<0.2")
    assert [pinned.path for pinned in read.files] == [f"{n}{format.SUFFIX}" for n in "ab"]
    for pinned, concept in zip(read.files, ("church", "Van Gogh"), strict=True):
        data = read.locate(pinned).read_bytes()
        assert pinned.sha256 == hashlib.sha256(data).hexdigest()
        assert pinned.digest == format.parse(data).digest
        assert (pinned.concepts, pinned.required) == ((concept,), True)


def test_the_order_of_the_arguments_does_not_matter(tmp_path, lock):
    files = sorted(tmp_path.glob(f"*{format.SUFFIX}"))
    policy.write(tmp_path / "again.lock", BASE, "demo", [*files, *reversed(files)])
    assert (tmp_path / "again.lock").read_bytes() == lock.read_bytes()


def test_paths_are_relative_to_the_lock(tmp_path, monkeypatch):
    stored(tmp_path / "erasures")
    (tmp_path / "locks").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "locks", target_is_directory=True)
    monkeypatch.chdir(tmp_path / "erasures")
    for folder in ("locks", "link"):
        lock = tmp_path / folder / "conceptzap.lock"
        policy.write(lock, BASE, "demo", [Path(f"a{format.SUFFIX}")], force=True)
        read = policy.read(lock)
        assert read.files[0].path == f"../erasures/a{format.SUFFIX}"
        assert policy.verify_files(read)[0].samefile(f"a{format.SUFFIX}")


def test_a_base_is_named_from_the_lock_too(tmp_path, monkeypatch):
    """From wherever it is written and from wherever it is verified."""
    (tmp_path / "bases" / "mine").mkdir(parents=True)
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "near").mkdir()
    file = stored(tmp_path / "erasures")
    monkeypatch.chdir(tmp_path / "bases")
    lock = tmp_path / "locks" / "conceptzap.lock"
    for base, named in (("mine", "../bases/mine"), (str(tmp_path / "locks" / "near"), "./near")):
        policy.write(lock, BASE, base, [file], force=True)
        read = policy.read(lock)
        assert read.base_name == named
        monkeypatch.chdir(tmp_path)
        assert Path(read.locate_base()).samefile(lock.parent / named)
        monkeypatch.chdir(tmp_path / "bases")
    for name in ("demo", "owner/name@main"):
        policy.write(lock, BASE, name, [file], force=True)
        assert policy.read(lock).base_name == policy.read(lock).locate_base() == name


def test_a_lock_on_a_folder_is_verified_from_anywhere(sd1, tmp_path, monkeypatch):
    file = write(sd1, "church", tmp_path)
    save_tiny(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    guard.lock([file], "base", tmp_path / "my.lock")
    monkeypatch.chdir("/")
    assert guard.verify(tmp_path / "my.lock").base_name == "./base"


def test_a_lock_keeps_what_its_base_was_said_to_predict(sd1, tmp_path, monkeypatch):
    """Else it is verified, and drawn under, as a checkpoint that it is not."""
    file, folder = write(sd1, "church", tmp_path), save_tiny(tmp_path / "base")
    lock = tmp_path / "my.lock"
    guard.lock([file], folder, lock, prediction="v_prediction")
    assert policy.read(lock).prediction == "v_prediction"
    asked = []
    monkeypatch.setattr(opening, "_placed", lambda *given, placed=opening._placed: (
        asked.append(given[-1]) or placed(*given)
    ))  # fmt: skip
    guard.verify(lock)
    assert asked == ["v_prediction"]
    with pytest.raises(RefusedError, match="predicting epsilon, not v_prediction"):
        policy.check_base(policy.read(lock), load_base(str(folder)))
    guard.lock([file], str(folder), lock, force=True)
    assert policy.read(lock).prediction is None and b"prediction" not in lock.read_bytes()


def test_an_existing_lock_is_kept_without_force(lock):
    before = lock.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        policy.write(lock, BASE, "demo", [stored(lock.parent, "cat", name="c")])
    assert lock.read_bytes() == before
    policy.write(lock, BASE, "demo", [stored(lock.parent, "cat", name="c")], force=True)
    assert [pinned.concepts for pinned in policy.read(lock).files] == [("cat",)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"role": "key"}, "role 'key'"),
        ({"role": "attack"}, "role 'attack'"),
        ({"scale": 0.5}, "strength 0.5, not 1"),
        ({"base": dataclasses.replace(BASE, signature="6" * 64)}, "another architecture"),
        (
            {"base": dataclasses.replace(BASE, fingerprint=PRINTS | {"text": HEX})},
            "another checkpoint",
        ),
    ],
)
def test_what_no_policy_may_hold_is_not_locked(tmp_path, changes, reason):
    path = stored(tmp_path, **changes)
    with pytest.raises(RefusedError, match=reason) as caught:
        policy.write(tmp_path / "x.lock", BASE, "demo", [path])
    assert caught.value.exit_code == 6
    assert not (tmp_path / "x.lock").exists()


def test_only_erasures_are_locked(tmp_path):
    (tmp_path / "a.txt").write_text("no erasure")
    for name in ("a.txt", "absent"):
        with pytest.raises(FormatError, match=name):
            policy.write(tmp_path / "x.lock", BASE, "demo", [tmp_path / name])
    with pytest.raises(UsageError, match="nothing to lock"):
        policy.write(tmp_path / "x.lock", BASE, "demo", [])
    assert not (tmp_path / "x.lock").exists()


def test_a_base_without_all_its_parts_is_not_locked(tmp_path):
    base = dataclasses.replace(BASE, fingerprint={"attn2": HEX, "text": HEX[::-1]})
    with pytest.raises(UsageError, match="lacks 'unet'"):
        policy.write(tmp_path / "x.lock", base, "demo", [stored(tmp_path)])


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('schema = "conceptzap.lock/1"', 'schema = "conceptzap.lock/2"', "conceptzap.lock/2"),
        ('schema = "conceptzap.lock/1"', "", "schema is None"),
        ("[base]", "strict = false\n[base]", "unknown 'strict'"),
        ("[base]", "[base]\nextra = 1", "unknown 'extra'"),
        ("[base.fingerprint]", "[base.fingerprint]\nvae = 'x'", "unknown 'vae'"),
        ("required = true", "required = true\nstrength = 0.5", "unknown 'strength'"),
        ("required = true", "", "lacks 'required'"),
        ("required = true", "required = 1", "required of a file is not of type bool"),
        ("required = true", "required = false", "requires no file"),
        (f'signature = "{"5" * 64}"', 'signature = ""', "signature is not 64"),
        ('unet = "0', 'unet = "', "unet is not 64"),
        ('sha256 = "', 'sha256 = "0', "sha256 is not 64"),
        ('digest = "', 'digest = "g', "digest is not 64"),
        ('concepts = [\n', 'concepts = [1,\n', "concepts"),
        ('concepts = [\n', 'concepts = [ [\n', "no sound policy"),
        (f'path = "a{format.SUFFIX}"', f'path = "./b{format.SUFFIX}"', "names a file twice"),
        (f'path = "a{format.SUFFIX}"', 'path = "/etc/passwd"', "no path from"),
        (f'path = "a{format.SUFFIX}"', 'path = "a\\u0000"', "no path from"),
        (f'path = "a{format.SUFFIX}"', 'path = "."', "no path from"),
        (">=0.1.0,<0.2", "", "no range"),
        (">=0.1.0,<0.2", " , ", "no range"),
        (">=0.1.0,<0.2", "any", "no sound policy"),
        ("[base]", "[base", "no sound policy"),
        ("schema", "schema = 1\nschema", "no sound policy"),
    ],
)
def test_a_malformed_policy_is_a_usage_error(lock, old, new, told):
    change(lock, old, new)
    with pytest.raises(UsageError) as caught:
        policy.read(lock)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"\xef\xbb\xbf" + b"x = 1", b"x = " + b"[" * 100_000, b"\0" * 64, b"#" * 2**21],
)
def test_what_is_no_toml_is_a_usage_error(tmp_path, data):
    (tmp_path / "x.lock").write_bytes(data)
    with pytest.raises(UsageError):
        policy.read(tmp_path / "x.lock")


@pytest.mark.parametrize("name", ["absent.lock", "."])
def test_a_missing_policy_is_a_usage_error(tmp_path, name):
    with pytest.raises(UsageError):
        policy.read(tmp_path / name)


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@settings(deadline=None)
@given(name=TEXT, identity=TEXT, revision=TEXT, concepts=st.lists(TEXT), path=TEXT, part=TEXT)
def test_the_toml_says_what_was_meant(name, identity, revision, concepts, path, part):
    pins = (Pinned(path, HEX, HEX, tuple(concepts)),)
    base = BaseRef("sd1", identity, revision, HEX, {part: HEX})
    draft = Policy(Path("x.lock"), "", ">=0.1", name, base, pins)
    text = lockfile.encode(draft).decode()
    assert all(line.isprintable() for line in text.split("\n"))
    tree = tomllib.loads(text)
    assert tree["base"] == {"name": name, **base.record()}
    assert tree["files"] == [{**vars(pins[0]), "concepts": concepts}]


@settings(deadline=None)
@given(
    name=TEXT, identity=TEXT, concepts=st.lists(TEXT), stem=st.text("ab ü\"'\\\n\t#=[]", min_size=1)
)
def test_any_policy_is_read_as_it_was_written(name, identity, concepts, stem):
    pins = (Pinned(stem, HEX, HEX, tuple(concepts)),)
    base = dataclasses.replace(BASE, id=identity)
    draft = Policy(Path("x.lock"), "", ">=0.1,!=0.5", name, base, pins)
    read = lockfile.parse(draft.path, lockfile.encode(draft))
    assert dataclasses.replace(read, digest="") == draft


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None
)
@given(data=st.data())
def test_only_our_errors_escape_from_a_mangled_policy(lock, data):
    good = lock.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    put = data.draw(st.binary(max_size=4))
    cut = data.draw(st.integers(0, 6))
    mangled = lock.with_name("mangled.lock")
    mangled.write_bytes(good[:at] + put + good[at + cut :])
    try:
        policy.verify_files(policy.read(mangled))
    except ConceptZapError as error:
        assert "\n" not in str(error)


def test_a_name_that_is_not_utf8_is_a_usage_error(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.lprompt.safetensors"))
    stored(tmp_path).rename(path)
    with pytest.raises(UsageError, match="UTF-8"):
        policy.write(tmp_path / "x.lock", BASE, "demo", [path])
