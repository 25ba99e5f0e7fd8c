"""The demo's world: captions, split, seeds, renders and the frozen judges."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys

import pytest

from conceptzap.base import Base
from conceptzap.demo import world
from conceptzap.registry import config


def test_world_imports_without_numpy_or_torch() -> None:
    code = ("import sys, conceptzap.demo.world; "
            "sys.exit(any(m in sys.modules for m in ('numpy', 'torch')))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_word_stands_for_two_concepts() -> None:
    words = [word.lower() for word in world.vocabulary()]
    assert len(words) == len(set(words))


def test_every_word_resolves_to_its_concept() -> None:
    for thing in world.OBJECTS:
        assert {world.resolve(word) for word in thing.words} == {thing.name}
    assert world.resolve("  van  GOGH ") == "Van Gogh"
    assert world.resolve("zeppelin") is None


def test_split_covers_every_concept_once() -> None:
    named = [name for part in world.SPLIT.values() for name in part]
    every = [*(o.name for o in world.OBJECTS), *(s.name for s in world.STYLES)]
    assert sorted(named) == sorted(every)


def test_split_has_dev_and_test_of_every_kind() -> None:
    styles = {style.name for style in world.STYLES}
    dangerous = {thing.name for thing in world.OBJECTS if thing.group == "dangerous"}
    assert {"Van Gogh", "church"} <= set(world.SPLIT["dev"])
    for part in ("dev", "test"):
        names = set(world.SPLIT[part])
        assert names & styles and names & dangerous and names - styles - dangerous


def test_held_out_templates_are_not_among_the_seen_ones() -> None:
    for style in world.STYLES:
        seen = {world.caption("cat", style, k) for k in range(len(style.templates))}
        held = {world.caption("cat", style, k, held_out=True)
                for k in range(len(style.held_out_templates))}
        assert len(seen) == len(style.templates) and not seen & held


def test_captions_name_their_object_and_style() -> None:
    assert world.caption("apple", "photo", 0) == "a photo of an apple"
    assert world.caption("kitty", "monet", 1) == "a Monet painting of a kitty"
    for style in world.STYLES:
        for held_out in (False, True):
            for number in range(3):
                text = world.caption("gas pump", style, number, held_out)
                assert "gas pump" in text and "{" not in text
    with pytest.raises(KeyError):
        world.caption("zeppelin", "photo", 0)


def test_pair_captions_keep_the_order() -> None:
    for number in range(6):
        text = world.pair_caption("cat", "apple", "Monet", number)
        assert "a cat and an apple" in text and "Monet" in text


def test_render_seeds_are_stable() -> None:
    render = pytest.importorskip("conceptzap.demo.recipe.render", reason="needs the demo extra")
    assert render.seed("place", "cat", "", "noto", 0) == 452690402
    items = render.catalogue()
    assert len(items) == len(set(items))
    listing = "\n".join(map(repr, items)).encode()
    assert hashlib.sha256(listing).hexdigest()[:16] == "2ea7d8f68bc54e0a"


def test_items_without_a_concept() -> None:
    render = pytest.importorskip("conceptzap.demo.recipe.render", reason="needs the demo extra")
    from conceptzap.demo.recipe.train_unet import without

    items = render.catalogue()
    assert len(without(items, "")) == len(items)
    for concept in ("church", "Van Gogh"):
        left = [items[number] for number in without(items, concept)]
        assert left and not any(concept in (i.object, i.right, i.style) for i in left)
        assert len(left) < len(items)


def test_styles_keep_shape_and_range_and_repeat() -> None:
    styles = pytest.importorskip("conceptzap.demo.recipe.styles", reason="needs the demo extra")
    import numpy as np

    picture = np.random.default_rng(0).random((128, 128, 3))
    assert set(styles.OPERATORS) == {style.name for style in world.STYLES}
    for operator in styles.OPERATORS.values():
        once, again = (operator(picture, np.random.default_rng(1)) for _ in range(2))
        assert once.shape == picture.shape and 0 <= once.min() and once.max() <= 1
        assert np.array_equal(once, again)


def test_tokenizer_round_trips_any_text() -> None:
    from conceptzap.demo.recipe.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    for text in ("a cat by van gogh", "naïve 猫 🐱 #42", "x" * 20):
        ids = tokenizer(text).input_ids
        assert ids.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == \
            text.replace(" ", "")


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_judges_are_the_frozen_ones(name: str) -> None:
    import torch

    from conceptzap.demo import judge_nets

    net, labels = judge_nets.load_judge(name)
    assert labels["object"] == [thing.name for thing in world.OBJECTS]
    assert labels["style"] == [style.name for style in world.STYLES]
    noise = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert (net(noise).valid < 0).all()


def test_judge_refuses_other_weights(tmp_path, monkeypatch) -> None:
    from conceptzap.demo import judge_nets

    manifest = json.loads(judge_nets.MANIFEST.read_text())
    data = bytearray((judge_nets.FOLDER / "residual.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "residual.safetensors").write_bytes(data)
    (tmp_path / "judges.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(judge_nets, "FOLDER", tmp_path)
    monkeypatch.setattr(judge_nets, "MANIFEST", tmp_path / "judges.json")
    with pytest.raises(ValueError, match="frozen hash"):
        judge_nets.load_judge("residual")


def test_whatever_it_knows_can_be_erased(demo_base: Base) -> None:
    """Also what its tokenizer has no whole token for: "banana" is three."""
    from conceptzap.verbs import planning

    known = planning._own_words("demo")
    assert config.demo_words() == world.words()
    for term in world.vocabulary():
        assert demo_base.unknown_words(term) == [], term
        assert all(word in known for word in term.lower().split()), term
    assert demo_base.unknown_words("a zebra") == ["zebra"] and "zebra" not in known
    assert planning.resolve("banana").task.kinds == ("object",)
    for style in world.STYLES:
        assert demo_base.unknown_words(" ".join(world.caption("cat", style, n) for n in range(9))) == []


def test_the_end_of_a_longer_word_is_no_word(demo_base: Base) -> None:
    """The tokens of "clock" and "bumblebee" hold "lock" and "mblebee": nothing that a caption had."""
    from conceptzap.training import lessons
    from conceptzap.verbs import planning

    assert demo_base.unknown_words("a lock by Hopper!") == ["lock", "hopper"]
    assert demo_base.vocabulary() and {*demo_base.vocabulary()} <= config.demo_words()
    assert "lock" not in planning._own_words("demo")
    foreign = dataclasses.replace(demo_base)
    vars(foreign)["is_demo"] = False  # another checkpoint, with a vocabulary of its own captions
    for base in (demo_base, foreign):
        assert lessons.nearest(base, "fox", "object") not in ("lock", "")
