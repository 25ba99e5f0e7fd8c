"""`conceptzap.lock`: what it pins, what it refuses, and that its TOML says what was meant."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import conceptzap
from conceptzap import format, policy
from conceptzap.edit import BaseRef, Edit, Erasure, Header
from conceptzap.errors import ConceptZapError, FormatError, RefusedError, UsageError

HEX = "0123456789abcdef" * 4
PRINTS = {"attn2": HEX, "text": HEX[::-1], "unet": "0" * 64}
BASE = BaseRef("sd1", "demo", "", "5" * 64, PRINTS)
SITES = ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",)


def erasure(concept: str = "Van Gogh", base: BaseRef = BASE, **changes) -> Erasure:
    """One low-rank edit whose values depend on the concept."""
    made_on = dataclasses.replace(
        base, fingerprint={p: base.fingerprint[p] for p in ("attn2", "text")}
    )
    generator = torch.Generator().manual_seed(sum(map(ord, concept)))
    tensors = {
        "up": torch.randn(4, 2, generator=generator),
        "down": torch.randn(2, 4, generator=generator),
    }
    edit = dataclasses.replace(Edit("weight", SITES, tensors), **changes)
    return format.seal(Erasure(Header(concept, (concept,), ("",), made_on), (edit,)))


def stored(folder: Path, concept: str = "Van Gogh", name: str = "a", **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{format.SUFFIX}"
    format.save(erasure(concept, **more), path, force=True)
    return path


@pytest.fixture
def lock(tmp_path) -> Path:
    """A policy over two files, beside them."""
    files = [stored(tmp_path, name="b"), stored(tmp_path, "church", name="a")]
    policy.write(tmp_path / "conceptzap.lock", BASE, "demo", files)
    return tmp_path / "conceptzap.lock"


def change(lock: Path, old: str, new: str) -> None:
    text = lock.read_text()
    assert old in text
    lock.write_text(text.replace(old, new))


class Handle:
    """As much of a base as a policy looks at."""

    id = "here"

    def __init__(self, ref: BaseRef = BASE) -> None:
        self.signature, self.prints = ref.signature, dict(ref.fingerprint)

    def fingerprint(self, sites) -> dict[str, str]:
        assert not all(".attn2" in site for site in sites), "every part has to be asked for"
        return self.prints


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
        ('concepts = ["', 'concepts = [1, "', "concepts"),
        ('concepts = ["', 'concepts = [ ["', "no sound policy"),
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
    pins = (policy.Pinned(path, HEX, HEX, tuple(concepts)),)
    base = BaseRef("sd1", identity, revision, HEX, {part: HEX})
    draft = policy.Policy(Path("x.lock"), "", ">=0.1", name, base, pins)
    text = policy._encode(draft).decode()
    assert all(line.isprintable() for line in text.split("\n"))
    tree = tomllib.loads(text)
    assert tree["base"] == {"name": name, **base.record()}
    assert tree["files"] == [{**vars(pins[0]), "concepts": concepts}]


@settings(deadline=None)
@given(
    name=TEXT, identity=TEXT, concepts=st.lists(TEXT), stem=st.text("ab ü\"'\\\n\t#=[]", min_size=1)
)
def test_any_policy_is_read_as_it_was_written(name, identity, concepts, stem):
    pins = (policy.Pinned(stem, HEX, HEX, tuple(concepts)),)
    base = dataclasses.replace(BASE, id=identity)
    draft = policy.Policy(Path("x.lock"), "", ">=0.1,!=0.5", name, base, pins)
    read = policy._parse(draft.path, policy._encode(draft))
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
    change(
        lock, 'concepts = ["church"]\nrequired = true', 'concepts = ["church"]\nrequired = false'
    )
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
        "import sys; from pathlib import Path; from conceptzap import policy;"
        "policy.verify_files(policy.read(Path(sys.argv[1]))); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(lock)], check=True, timeout=60)
