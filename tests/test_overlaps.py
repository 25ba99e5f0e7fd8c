"""Where files of a stack touch one another: one concept twice, gates that open for another's; in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command import conceptzap
from edits import always, tokens, width
from samples import header

import conceptzap as package
from conceptzap import api, format
from conceptzap.base import Base
from conceptzap.edit import Erasure, Gate
from conceptzap.report import Report
from conceptzap.runtime import gates
from conceptzap.verbs import overlaps


def opens_for(base: Base, *prompts: str) -> Gate:
    """A gate that opens for these prompts, and for no other."""
    states = gates.unit(base.encode(prompts).states)  # [prompts, length, width]
    ends = (base.token_ids(prompts)[0] == base.tokenizers[0].eos_token_id).int().argmax(1)
    query = states[range(len(prompts)), ends]
    return Gate("match", {"threshold": 0.9999}, {"query": query, "mean": torch.zeros(width(base))})


def file(base: Base, concept: str, *gates: Gate, seed: int = 0) -> Erasure:
    edit = tokens(base, seed=seed, gates=gates)
    about = header(title=concept, concepts=(concept,), anchors=("",), base=base.reference(edit.modules))
    return format.seal(Erasure(about, (edit,)))


@pytest.fixture(scope="module")
def parts(sd1: Base) -> list[Erasure]:
    """A church whose gate opens for a dog, too; a dog and a cat; a cat behind no gate; a timed tree."""
    return [
        file(sd1, "church", opens_for(sd1, "church", "dog", "tree")), file(sd1, "dog", opens_for(sd1, "dog")),
        file(sd1, "cat", opens_for(sd1, "cat"), always(sd1)), file(sd1, "a Cat", seed=1),
        file(sd1, "tree", always(sd1), seed=2),
    ]  # fmt: skip


def test_names_and_gates_that_overlap_in_any_order(sd1: Base, parts: list[Erasure]) -> None:
    wanted = {
        "concepts": {"a Cat": ["a Cat", "cat"]}, "gates": {"church": ["dog", "tree"]},
        "everywhere": ["a Cat", "tree"],
    }  # fmt: skip
    assert overlaps.find(parts, sd1).record() == wanted
    assert overlaps.find([*parts[::-1], parts[0]], sd1).record() == wanted
    assert overlaps.find(parts).record() == {**wanted, "gates": None}
    assert overlaps.find(parts, sd1).lines() == [
        "'a Cat' is erased more than once: by a Cat, cat", "the gate of 'church' opens for 'dog', 'tree', too",
    ]  # fmt: skip
    assert overlaps.find([]).lines() == [] and overlaps.find(parts[3:], sd1).record()["gates"] == {}


def test_a_stack_and_its_own_parts_are_no_overlap(sd1: Base, parts: list[Erasure]) -> None:
    both = api.stack(parts[:2])
    assert overlaps.find([both, *parts[:2]]).concepts == {}
    assert overlaps.find([both, parts[2]]).concepts == {}
    other = file(sd1, "dog", seed=9)
    assert overlaps.find([both, other]).concepts == {"dog": ("church + dog", "dog")}
    assert overlaps.find([api.stack([parts[1], other])]).concepts == {}, "what one file holds is its own"


def test_gates_agree_with_what_they_do_alone(sd1: Base) -> None:
    """All at once as one by one, whatever kind of gate reads the text."""
    soft = opens_for(sd1, "horse")
    kinds = [
        opens_for(sd1, "church"), Gate("token", soft.params, soft.tensors),
        Gate("similar", {"threshold": 0.99, "full": 0.9999, "power": 1.0}, opens_for(sd1, "car").tensors),
    ]  # fmt: skip
    files = [file(sd1, name, gate, seed=7) for name, gate in zip(("a", "b", "c"), kinds, strict=True)]
    asked = [file(sd1, name, opens_for(sd1, name), seed=8) for name in ("church", "horse", "car")]
    assert overlaps.find([*files, *asked], sd1).gates == {"a": ("church",), "b": ("horse",), "c": ("car",)}


def test_many_are_told_by_the_first_few() -> None:
    headers = [header(title=f"{i}{twin}", concepts=(f"thing {i:02d}",)) for i in range(15) for twin in "xy"]
    found = overlaps.Overlaps(overlaps.repeated(headers))
    assert len(found.concepts) == 15 and len(found.lines()) == 11
    assert found.lines()[-1] == "and 5 more like the last (--json has all)"


def test_stack_and_inspect_tell_of_them(
    parts: list[Erasure], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"{number}.lprompt.safetensors" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        format.save(part, name)
    answer = conceptzap("stack", *names, "-o", "all", "--base", tiny_folder)
    assert answer.code == 0 and "warning: the gate of 'church' opens for 'dog', 'tree', too" in answer.err
    assert "'a Cat' is erased more than once: by 2.lprompt.safetensors, 3.lprompt.safetensors" in answer.err.replace("\n", " ")
    assert "2 files act on every prompt" in answer.err
    told = [conceptzap("stack", *order, "-o", f"{n}s", "--json").json for n, order in enumerate((names, names[::-1]))]
    assert told[0]["overlaps"] == told[1]["overlaps"] and told[0]["overlaps"]["gates"] is None
    assert told[0]["digest"] == told[1]["digest"]
    seen = conceptzap("inspect", *names[2:4])
    assert "is erased by 2 of these files: 2.lprompt.safetensors, 3.lprompt.safetensors" in seen.err.replace("\n", " ")
    twice = conceptzap("inspect", *names[2:4], "--json").json["overlaps"]["concepts"]
    assert twice == told[0]["overlaps"]["concepts"] == {"a Cat": names[2:4]}
    assert "overlaps" not in conceptzap("inspect", *names[:2], "--json").json


def test_a_base_of_another_architecture_is_not_asked(parts: list[Erasure], sd2: Base, tmp_path: Path) -> None:
    path = tmp_path / "x.lprompt.safetensors"
    format.save(parts[0], path)
    given: dict[str, Any] = {"base": sd2, "report": Report()}
    with pytest.raises(package.MismatchError, match="another architecture"):
        api.stack_files([path], tmp_path / "y", **given)
    assert not (tmp_path / "y.lprompt.safetensors").exists()
