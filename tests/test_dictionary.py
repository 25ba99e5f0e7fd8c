"""Sparse dictionaries: what they keep and rebuild, that training explains, and where they are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from conceptzap.base import Base
from conceptzap.errors import FormatError, MismatchError, ResourceError
from conceptzap.format import cache
from conceptzap.report import Report
from conceptzap.task import Task
from conceptzap.training import dictionary, objectives
from conceptzap.training.dictionary import Dictionary, Recipe

SITE, OTHER = "unet.up_blocks.1.attentions.0", "unet.up_blocks.1.attentions.1"
RECIPE = Recipe(expansion=4, k=4, steps=4, rows=64, pictures=2, lr=0.01)


@pytest.fixture(autouse=True)
def short_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "DENOISING", 3)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_largest_of_a_batch_stay() -> None:
    h = randn(5, 8).relu()
    kept = dictionary.largest(h, 2)
    assert (kept > 0).sum() == 10 and torch.equal(kept[kept > 0], h[kept > 0])
    assert h[kept == 0].max() <= kept[kept > 0].min()


def test_orthogonal_features_are_rebuilt_exactly() -> None:
    """x = center + f D with an orthonormal D and f >= 0: f comes back, and so does x."""
    q, _ = torch.linalg.qr(randn(8, 8))
    center, f = randn(8, seed=1), dictionary.largest(randn(20, 8, seed=2).relu(), 2)
    made = Dictionary(q, torch.zeros(8), q, center, threshold=f[f > 0].min().item() / 2)
    x = center + f @ q
    assert torch.allclose(made.features(x), f, atol=1e-6)
    assert torch.allclose(made.rebuild(made.features(x)), x, atol=1e-5)


def test_training_explains_what_a_module_gives(sd1: Base) -> None:
    data = dictionary.examples(sd1, [SITE], RECIPE, Report(seed=5))[SITE]
    again = dictionary.examples(sd1, [SITE, OTHER], RECIPE, Report(seed=6))
    assert data.equal(again[SITE]) and again[OTHER].shape == data.shape  # of the base, of no seed
    few, many = (dictionary.train(sd1, SITE, data, replace(RECIPE, steps=n), Report()) for n in (1, 80))
    left = [(data - d.rebuild(d.features(data))).pow(2).sum() / (data - data.mean(0)).pow(2).sum() for d in (few, many)]
    assert left[1] < 0.5 * left[0] and left[1] < 0.5
    active = (many.features(data) > 0).sum(1).float().mean().item()
    assert 0.5 * RECIPE.k < active < 2 * RECIPE.k
    lengths = many.decoder.norm(dim=1)
    assert torch.allclose(lengths, lengths[:1].expand_as(lengths), rtol=1e-4)


def test_it_is_trained_once_for_a_base_and_kept(
    sd1: Base, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = dictionary.of(sd1, [SITE], RECIPE, Report(seed=1))[SITE]
    train = dictionary.train
    monkeypatch.setattr(dictionary, "train", lambda *given: pytest.fail("trained again"))
    again = dictionary.of(sd1, [SITE], RECIPE, Report(seed=2))[SITE]
    for name in ("encoder", "bias", "decoder", "center"):
        assert torch.equal(getattr(made, name), getattr(again, name))
    assert made.threshold == again.threshold
    assert cache.sizes()["dictionaries"] > 1000
    monkeypatch.setattr(dictionary, "train", train)
    dictionary.of(sd1, [SITE, OTHER], RECIPE, Report())
    dictionary.of(sd1, [SITE], replace(RECIPE, k=5), Report())
    assert len(list(cache.folder("dictionaries").iterdir())) == 3


def published(path: Path, width: int, **more: torch.Tensor) -> str:
    rows = randn(2 * width, width)
    tensors = {"encoder.weight": rows, "encoder.bias": torch.zeros(2 * width), "W_dec": rows.clone()}
    save_file(tensors | {"b_dec": torch.zeros(width)} | more, path)
    return str(path)


def test_one_in_the_published_layout_is_loaded(sd1: Base, tmp_path: Path) -> None:
    """It says no threshold, so that is found by what it keeps of the base's own activations."""
    found = dictionary.of(sd1, [SITE], RECIPE, Report(), published(tmp_path / "sae.safetensors", 16))[SITE]
    data = dictionary.examples(sd1, [SITE], RECIPE, Report())[SITE]
    active = (found.features(data) > 0).sum(1).float().mean().item()
    assert found.encoder.shape == (32, 16) and 0.5 * RECIPE.k < active < 2 * RECIPE.k


def test_what_is_no_dictionary_of_this_module_is_refused(sd1: Base, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="is of 12 features"):
        dictionary.of(sd1, [SITE], RECIPE, Report(), published(tmp_path / "narrow", 12))
    with pytest.raises(FormatError, match="do not fit each other"):
        dictionary.of(sd1, [SITE], RECIPE, Report(), published(tmp_path / "odd", 16, b_dec=torch.zeros(3)))
    (tmp_path / "text").write_text("no")
    with pytest.raises(FormatError, match="is no dictionary"):
        dictionary.of(sd1, [SITE], RECIPE, Report(), str(tmp_path / "text"))
    with pytest.raises(ResourceError, match="cannot read"):
        dictionary.of(sd1, [SITE], RECIPE, Report(), str(tmp_path / "nothing"))


def test_a_feature_of_the_same_things_is_not_the_concepts(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """saeuron: what fires for the same prompts with the anchor, too, is not chosen, though it fires most."""
    from conceptzap.methods import saeuron

    site, width = "unet.up_blocks.1.attentions.0", sd1.module("unet.up_blocks.1.attentions.0").out_channels
    words = Dictionary(randn(3, width), torch.zeros(3), randn(3, width, seed=1), torch.zeros(width))
    #                      the things, the concept, everything
    fired = {"concept": [9.0, 2.0, 4.0], "anchor": [9.0, 0.1, 4.0], "rest": [0.1, 0.1, 4.0]}

    def drawn(pairs) -> SimpleNamespace:
        kind = "concept" if "Van Gogh" in pairs[0].concept else "anchor"
        return SimpleNamespace(kind=kind, times=torch.tensor([900, 500, 100]))

    stays = SimpleNamespace(kind="rest")
    either = SimpleNamespace(of=lambda base, pairs, *_: drawn(pairs), kept=lambda *_: stays)
    monkeypatch.setattr(saeuron, "Trajectories", either)
    monkeypatch.setattr(dictionary, "of", lambda *_: {site: words})
    rows = {kind: torch.tensor(means).repeat(3, 1) for kind, means in fired.items()}
    monkeypatch.setattr(saeuron, "averages", lambda base, one, *_: {site: rows[one.kind]})
    task = Task(("Van Gogh",), ("painting",), ("Monet",), ("style",))
    made = list(saeuron.erase(sd1, task, saeuron.Config(sites=site, features=1, trajectories=2), Report()))
    assert torch.equal(made[0].tensors["down"], words.encoder[1:2])
