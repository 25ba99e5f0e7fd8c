"""From a concept to pictures without it, through the real command line, on a tiny random base."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from command import Answer, conceptzap, contents
from PIL import Image

from conceptzap import api, format
from conceptzap.errors import UsageError
from conceptzap.format.pictures import read_text
from conceptzap.registry import config, family
from conceptzap.testing import save_tiny
from conceptzap.verbs import planning

SUFFIX = ".lprompt.safetensors"
DRAW = ("--base", "base", "--steps", "2", "--guidance", "2")

pytestmark = pytest.mark.usefixtures("few_steps", "loaded_once")


@cache
def closed_form() -> str:
    """A method without optimisation that has a rank: quick, whatever it is called."""
    for name in (m["name"] for m in conceptzap("methods", "--json").json["methods"]):
        (found,) = conceptzap("methods", name, "--json").json["methods"]
        settings = {setting["name"] for setting in found["settings"]}
        if "rank" in settings and "steps" not in settings:
            return name
    raise AssertionError("no closed-form method")


@cache
def trained() -> str:
    """A method with a key file: it optimises."""
    for name in (m["name"] for m in conceptzap("methods", "--json").json["methods"]):
        (found,) = conceptzap("methods", name, "--json").json["methods"]
        if "order" in {setting["name"] for setting in found["settings"]}:
            return name
    raise AssertionError("no method that leaves a key")


def pixels(name: str) -> bytes:
    with Image.open(name) as picture:
        return picture.tobytes()


@pytest.fixture(scope="module")
def erased(loaded_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    folder = tmp_path_factory.mktemp("flow")
    save_tiny(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ("cat", "--anchor", "dog", "--keep", "horse", "--keep", "church", "--base", "base")
        answer = conceptzap("erase", *words, "--method", closed_form(), "--json")
        conceptzap("erase", "house", *words[1:], "--method", closed_form(), "-o", "other")
    return folder, answer


@pytest.fixture
def here(erased: tuple[Path, Answer], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(erased[0])
    return erased[0]


def test_erase(erased: tuple[Path, Answer]) -> None:
    folder, answer = erased
    assert answer.code == 0, answer
    made = answer.json
    assert set(made) == {
        "schema", "path", "bytes", "digest", "method", "seconds", "scores", "preview", "key",
    }  # fmt: skip
    assert made["schema"] == "conceptzap.erase/1"
    assert made["path"] == str(folder / f"cat{SUFFIX}")
    assert made["bytes"] == (folder / f"cat{SUFFIX}").stat().st_size
    assert made["digest"] == format.read_header(folder / f"cat{SUFFIX}").digest
    assert made["preview"] == str(folder / "cat.png") and (folder / "cat.png").is_file()
    assert made["key"] is None


def test_erase_ends_with_the_path_and_the_next_command(here: Path) -> None:
    words = ("erase", "cat", "--base", "base", "--method", closed_form(), "-o", "again", "--force")
    answer = conceptzap(*words)
    assert answer.out == f"{here / f'again{SUFFIX}'}\n"
    last = answer.err.splitlines()[-1]
    assert last == f'next: conceptzap generate "a cat" --with again{SUFFIX} --compare --base base'
    following = shlex.split(last.removeprefix("next: conceptzap "))
    assert conceptzap(*following, "--steps", "2", "-o", "next").code == 0


def test_the_same_seed_gives_the_same_bytes(here: Path) -> None:
    words = ("erase", "tree", "--base", "base", "--method", closed_form())
    for name in ("one", "two"):
        assert conceptzap(*words, "-o", name).code == 0
    assert (here / f"one{SUFFIX}").read_bytes() == (here / f"two{SUFFIX}").read_bytes()
    assert (here / "one.png").read_bytes() == (here / "two.png").read_bytes()


def test_a_dry_run_does_nothing(here: Path) -> None:
    before = contents(here)
    answer = conceptzap("erase", "dog", "--base", "base", "--seed", "3", "--dry-run", "--json")
    assert answer.code == 0 and answer.json["schema"] == "conceptzap.plan/1"
    assert answer.json["seed"] == 3 and answer.json["concepts"] == ["dog"]
    assert contents(here) == before


def test_a_plan_is_shown_where_its_file_is_there(here: Path) -> None:
    words = ("erase", "cat", "--anchor", "dog", "--base", "base")
    before = contents(here)
    answer = conceptzap(*words, "-n", "--json")
    assert answer.code == 0 and answer.json["concepts"] == ["cat"]
    assert "cat.lprompt.safetensors exists: only with --force it would be replaced" in answer.err
    assert "exists" not in conceptzap(*words, "-n", "--force").err
    assert conceptzap(*words).code == 2 and contents(here) == before


def test_a_dry_run_saves_the_settings_that_it_is_asked_for(here: Path) -> None:
    words = ("erase", "dog", "House", "--base", "base", "--anchor", "cat", "--kind", "object")
    more = ("--limit", "2", "--no-preview", "--harden", "quick")  # scores and the thumbnail are in the file
    plan = conceptzap(*words, *more, "-n", "--save-config", "dry.toml", "--json").json
    assert plan["concepts"] == ["dog", "House"] and plan["kinds"] == ["object", "object"]
    again = conceptzap("erase", "--config", "dry.toml", "-n", "--json").json
    assert again == plan and (plan["limit"], plan["preview"], plan["harden"]) == (2, False, "quick")
    other = conceptzap("erase", "tree", "--config", "dry.toml", "-n", "--json").json
    assert other["concepts"] == ["tree"] and other["anchors"] == ["cat"]


def test_saved_settings_make_the_same_file_again(here: Path) -> None:
    words = ("erase", "horse", "--base", "base", "--method", closed_form(), "--anchor", "dog")
    more = ("--keep", "church", "--keep", "a \"tree\"", "--set", "rank=3", "--seed", "5")
    first = conceptzap(*words, *more, "-o", "saving", "--save-config", "saved.toml", "--json")
    again = conceptzap("erase", "horse", "--config", "saved.toml", "-o", "saved", "--json")
    assert first.code == again.code == 0 and again.json["digest"] == first.json["digest"]
    assert (here / f"saving{SUFFIX}").read_bytes() == (here / f"saved{SUFFIX}").read_bytes()
    plan = conceptzap("erase", "dog", "--config", "saved.toml", "--anchor", "cat", "-n", "--json").json
    assert plan["seed"] == 5 and plan["config"]["rank"] == 3 and plan["anchors"] == ["cat"]
    before = contents(here)
    answer = conceptzap(*words, "-o", "third", "--save-config", "saved.toml")
    assert answer.code == 2 and "saved.toml exists" in answer.error and contents(here) == before


@pytest.mark.parametrize("name", family.members("methods"))
def test_every_method_s_settings_can_be_saved(name: str, tmp_path: Path) -> None:
    fields = family.load("methods", name).Config.__dataclass_fields__
    chosen = next(key for key, field in fields.items() if type(field.default) in (int, float))
    request = {"method": name, "preset": "paper", "overrides": {chosen: "3"}}
    plan, saved = api.plan("cat", **request), tmp_path / "c.toml"
    saved.write_bytes(config.to_toml(planning.resolve("cat", **request).config()))
    words = ("erase", "cat", "--config", saved, "-o", plan["output"], "--dry-run", "--json")
    assert conceptzap(*words).json == {"schema": "conceptzap.plan/1", **plan}


def test_a_method_without_steps_refuses_them(here: Path) -> None:
    answer = conceptzap("erase", "dog", "--method", closed_form(), "--steps", "5", "--base", "base")
    assert answer.code == 2 and "has no optimisation steps" in answer.error


def test_a_trained_method_leaves_its_key_beside(here: Path) -> None:
    words = ("--steps", "2", "--set", "trajectories=2", "--set", "batch=1", "--base", "base")
    answer = conceptzap("erase", "castle", *words, "--method", trained(), "--json")
    assert answer.code == 0, answer
    assert answer.json["key"] == str(here / f"castle.key{SUFFIX}")
    assert format.read_header(Path(answer.json["key"])).header.title == "castle (key)"
    assert re.search(r"2/2", answer.err), "the training shows its steps"
    assert conceptzap("stack", f"castle{SUFFIX}", f"castle.key{SUFFIX}", "-o", "castle-pair").code == 0
    for name in ("castle", "castle.key", "castle-pair"):
        info = format.read_header(here / f"{name}{SUFFIX}")
        tested = {edit for test in info.header.canary.values() for edit in test["edits"]}
        assert tested == {edit["name"] for edit in info.edits}, f"{name} has edits without a self-test"
    alone = conceptzap("stack", f"castle.key{SUFFIX}", "-o", "keys")
    assert alone.code == 0 and "warning: this stack holds keys only" in alone.err


def test_generate(here: Path) -> None:
    (here / "prompts.txt").write_text("a dog\n\n@a horse\n")
    words = ("a cat", "@cat", "--prompts", "prompts.txt", "--with", f"cat{SUFFIX}:0.5")
    answer = conceptzap("generate", *words, *DRAW, "--seed", "7", "--count", "2", "--json")
    assert answer.code == 0, answer
    images = answer.json["images"]
    assert answer.json["schema"] == "conceptzap.generate/1" and answer.json["compare"] is None
    assert [(i["prompt"], i["seed"]) for i in images] == [
        (prompt, seed) for prompt in ("a cat", "@cat", "a dog", "@a horse") for seed in (7, 8)
    ]
    names = [Path(image["path"]) for image in images]
    assert names[:3] == [here / "images" / f"{n}.png" for n in ("a-cat-7", "a-cat-8", "cat-7")]
    for image in images:
        assert set(image) == {"path", "prompt", "seed", "erasures"}
        (one,) = image["erasures"]
        assert set(one) == {"path", "digest", "strength", "fired"}
        assert one["path"] == str(here / f"cat{SUFFIX}") and one["strength"] == 0.5
        text = read_text(image["path"])
        assert text["prompt"] == image["prompt"] and text["seed"] == str(image["seed"])
        assert json.loads(text["settings"])["steps"] == 2
        assert json.loads(text["erasures"])[0]["digest"] == one["digest"]


def test_generate_never_overwrites(here: Path) -> None:
    words = ("generate", "a church", *DRAW, "-o", "pictures")
    paths = [conceptzap(*words).out.strip() for _ in range(2)]
    assert [Path(path).name for path in paths] == ["a-church-0.png", "a-church-0-2.png"]
    assert Path(paths[0]).read_bytes() == Path(paths[1]).read_bytes()
    assert conceptzap(*words, "--force").out.strip() == paths[0]


def test_generate_one_file(here: Path) -> None:
    answer = conceptzap("generate", "a cat", *DRAW, "-o", "one-picture.png")
    assert answer.out == f"{here / 'one-picture.png'}\n"
    assert conceptzap("generate", "a cat", *DRAW, "-o", "one-picture.png").code == 2


def test_a_picture_depends_on_nothing_but_its_own_seed(here: Path) -> None:
    many = conceptzap("generate", "a dog", "a cat", *DRAW, "--count", "2", "-o", "many", "--json")
    alone = conceptzap("generate", "a cat", *DRAW, "--seed", "1", "-o", "alone", "--json")
    paths = [answer.json["images"][-1]["path"] for answer in (many, alone)]
    assert Path(paths[0]).read_bytes() == Path(paths[1]).read_bytes()


def test_pictures_of_one_call_are_equal_within_rounding(here: Path) -> None:
    words = ("generate", "a cat", "a dog", "--with", f"cat{SUFFIX}", *DRAW, "--count", "2", "--json")
    one, many = (
        conceptzap(*words, "--batch", size, "-o", f"batch-{size}").json["images"] for size in (1, 3)
    )
    for alone, together in zip(one, many, strict=True):
        assert (alone["prompt"], alone["seed"]) == (together["prompt"], together["seed"])
        pair = zip(pixels(alone["path"]), pixels(together["path"]), strict=True)
        assert max(abs(a - b) for a, b in pair) <= 2


def test_the_order_of_erasures_makes_no_difference(here: Path) -> None:
    one, two = (("--with", f"{name}{SUFFIX}") for name in ("cat", "other"))
    conceptzap("generate", "a cat", *DRAW, *one, *two, "-o", "one-two.png")
    conceptzap("generate", "a cat", *DRAW, *two, *one, "-o", "two-one.png")
    assert pixels("one-two.png") == pixels("two-one.png")


def test_compare_draws_the_base_beside(here: Path) -> None:
    words = ("generate", "a cat", "a dog", "--with", f"cat{SUFFIX}", *DRAW, "--compare", "-o", "sheets")
    first, second = (conceptzap(*words, "--json").json["compare"] for _ in range(2))
    assert (first, second) == tuple(str(here / "sheets" / f"compare{n}.png") for n in ("", "-2"))
    assert Path(first).read_bytes() == Path(second).read_bytes()
    text = read_text(first)
    assert text["title"] == "original and without cat"
    assert json.loads(text["prompts"]) == ["a cat", "a dog"] and json.loads(text["seeds"]) == [0, 0]
    assert json.loads(text["settings"])["steps"] == 2 and text["base"] == "base"
    assert [one["strength"] for one in json.loads(text["erasures"])] == [1]


def test_compare_opens_the_base_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conceptzap import base

    opened = []
    monkeypatch.setattr(base, "load_base", lambda *a, load=base.load_base: opened.append(a) or load(*a))
    words = ("generate", "a cat", "--with", "cat", *DRAW, "--compare", "-o", "once")
    assert conceptzap(*words).code == 0 and len(opened) == 1


def test_a_sweep_is_one_strip(here: Path) -> None:
    words = ("generate", "a cat", "a dog", "--with", "cat:0.5", *DRAW, "--sweep", "0,.5,2")
    answer = conceptzap(*words, "-o", "strip.png", "--json")
    assert answer.code == 0, answer
    assert answer.json["images"] == [] and answer.json["compare"] is None
    assert answer.json["sweep"] == str(here / "strip.png")
    text = read_text("strip.png")
    assert text["title"] == "cat by strength" and json.loads(text["strengths"]) == [0, 0.5, 2]
    assert json.loads(text["prompts"]) == ["a cat", "a dog"] and json.loads(text["seeds"]) == [0, 0]
    assert conceptzap(*words, "-o", "strip.png").code == 2
    apart = conceptzap(*words, "-o", "new-folder", "--json")
    assert apart.json["sweep"] == str(here / "new-folder" / "sweep.png"), "a folder is made for it"
    with Image.open("strip.png") as strip:
        side = Image.open(conceptzap("generate", "a cat", *DRAW, "-o", "side.png").out.strip()).size[0]
        scale = max(1, 128 // side)
        assert strip.width > 3 * side * scale and strip.height > 2 * side * scale


def test_strengths_multiply(here: Path) -> None:
    asked = dict(base="base", steps=2, guidance=2, erasures=[("cat", 0.5)])
    parts = list(api.generate("a cat", strengths=(0, 1, 2), **asked))
    assert [one.erasures[0]["strength"] for one in parts] == [0, 0.5, 1]
    assert [one.erasures[0]["fired"] for one in parts] == [False, True, True]
    (whole,) = api.generate("a cat", **{**asked, "erasures": ["cat"]})
    assert (parts[2].array == whole.array).all() and (parts[0].array != whole.array).any()
    with pytest.raises(UsageError, match="strength"):
        api.generate("a cat", strengths=(5,), **asked)


@pytest.mark.parametrize("words", [("--sweep", "0,x"), ("--sweep", "0,3"), ("--sweep", ""),
                                   ("--sweep", "0,1", "--compare")])  # fmt: skip
def test_sweeps_that_cannot_be(here: Path, words: tuple[str, ...]) -> None:
    assert conceptzap("generate", "a cat", "--with", "cat", *DRAW, *words).code == 2
    assert conceptzap("generate", "a cat", *DRAW, "--sweep", "0,1").code == 2


def test_a_picture_says_what_webui_reads(here: Path) -> None:
    words = ("generate", "a cat", "--with", "cat:0.5", *DRAW, "--negative", "a dog", "--seed", "7")
    path = conceptzap(*words, "-o", "told.png").out.strip()
    told = read_text(path)["parameters"].splitlines()
    assert told[:2] == ["a cat", "Negative prompt: a dog"]
    digest = json.loads(read_text(path)["erasures"])[0]["digest"]
    with Image.open(path) as picture:
        size = f"{picture.width}x{picture.height}"
    assert told[2].startswith(f"Steps: 2, Sampler: DDIM, CFG scale: 2, Seed: 7, Size: {size}, Model: base, ")
    assert told[2].endswith(f'Erasures: "{digest[:12]}: 0.5"') and len(told) == 3


def test_strength_nought_is_the_base(here: Path) -> None:
    plain = conceptzap("generate", "a cat", *DRAW, "-o", "plain.png")
    weak = conceptzap("generate", "a cat", *DRAW, "--with", f"cat{SUFFIX}:0", "-o", "weak.png")
    full = conceptzap("generate", "a cat", *DRAW, "--with", f"cat{SUFFIX}", "-o", "full.png")
    assert plain.code == weak.code == full.code == 0
    assert pixels("plain.png") == pixels("weak.png") != pixels("full.png")


def test_stack_is_order_free(here: Path) -> None:
    pair = (f"cat{SUFFIX}", f"other{SUFFIX}")
    one = conceptzap("stack", *pair, "-o", "ab", "--json").json
    two = conceptzap("stack", *reversed(pair), "-o", "ba", "--json").json
    assert set(one) == {"schema", "path", "bytes", "digest", "concepts", "parents", "overlaps"}
    assert one["schema"] == "conceptzap.stack/1" and one["digest"] == two["digest"]
    assert (here / f"ab{SUFFIX}").read_bytes() == (here / f"ba{SUFFIX}").read_bytes()
    assert sorted(one["concepts"]) == ["cat", "house"] and len(one["parents"]) == 2


def test_stacking_equals_loading_together(here: Path) -> None:
    conceptzap("stack", f"cat{SUFFIX}", f"other{SUFFIX}", "-o", "pair")
    apart = [word for name in ("cat", "other") for word in ("--with", f"{name}{SUFFIX}")]
    conceptzap("generate", "a cat", *DRAW, *apart, "-o", "apart.png")
    conceptzap("generate", "a cat", *DRAW, "--with", f"pair{SUFFIX}", "-o", "together.png")
    assert pixels("apart.png") == pixels("together.png")


def test_the_same_concept_twice_is_allowed_with_a_warning(here: Path) -> None:
    words = ("cat", "--base", "base", "--method", closed_form(), "--seed", "9")
    for anchor in ("tree", "dog"):
        conceptzap("erase", *words, "--anchor", anchor, "-o", f"cat-to-{anchor}")
        pair = (f"cat{SUFFIX}", f"cat-to-{anchor}{SUFFIX}")
        answer = conceptzap("stack", *pair, "-o", f"twice-{anchor}")
        assert answer.code == 0 and "warning: 'cat' is erased more than once" in answer.err


def test_the_same_file_twice_counts_once(here: Path) -> None:
    same = conceptzap("stack", f"cat{SUFFIX}", f"cat{SUFFIX}", "-o", "same")
    assert same.code == 0 and "warning" not in same.err
    assert (here / f"same{SUFFIX}").read_bytes() == (here / f"cat{SUFFIX}").read_bytes()
    conceptzap("stack", f"cat{SUFFIX}", f"other{SUFFIX}", "-o", "whole")
    answer = conceptzap("stack", f"whole{SUFFIX}", f"cat{SUFFIX}", "-o", "whole-again")
    assert answer.code == 0 and "warning" not in answer.err
    assert (here / f"whole-again{SUFFIX}").read_bytes() == (here / f"whole{SUFFIX}").read_bytes()


def test_lock_and_verify(here: Path) -> None:
    locked = conceptzap("lock", f"cat{SUFFIX}", "--base", "base", "-o", "my.lock", "--json")
    assert locked.code == 0, locked
    ready = conceptzap("verify", "my.lock")
    assert (ready.code, ready.out) == (0, "READY\n")
    words = ("a cat", *DRAW, "--policy", "my.lock", "-o", "under-policy.png", "--json")
    drawn = conceptzap("generate", *words)
    assert drawn.code == 0, drawn
    assert read_text(here / "under-policy.png")["policy"] == locked.json["digest"]
    assert drawn.json["images"][0]["erasures"][0]["digest"] == locked.json["files"][0]["digest"]


def test_a_policy_that_does_not_hold_draws_nothing(here: Path) -> None:
    conceptzap("lock", f"other{SUFFIX}", "--base", "base", "-o", "broken.lock")
    moved = (here / f"other{SUFFIX}").rename(here / "elsewhere")
    try:
        before = contents(here)
        assert conceptzap("verify", "broken.lock").code == 6
        words = ("a cat", *DRAW, "--policy", "broken.lock", "-o", "never.png")
        assert conceptzap("generate", *words).code == 6
        assert contents(here) == before
    finally:
        moved.rename(here / f"other{SUFFIX}")


def test_not_erased_is_exit_7_and_keeps_the_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conceptzap.evaluation.closing import Closing
    from conceptzap.result import Score

    leaking = {"leak": Score("leak", 0.9, 0.8, 1.0, 20, "lower")}
    monkeypatch.setattr("conceptzap.verbs.erasing.closing", lambda *_, **__: Closing(leaking))
    words = ("erase", "car", "--base", "base", "--method", closed_form())
    answer = conceptzap(*words, "-o", "leaky", "--save-config", "leaky.toml")
    assert (here / "leaky.toml").is_file(), answer
    assert answer.code == 7 and answer.out == f"{here / f'leaky{SUFFIX}'}\n"
    assert "error: not erased" in answer.err.splitlines()[-1]
    spoken = conceptzap(*words, "-o", "leaky", "--force", "--json")
    assert spoken.code == 7 and spoken.json["error"]["code"] == 7
    assert set(spoken.json) == {"error"} and f"leaky{SUFFIX}" in spoken.json["error"]["message"]
