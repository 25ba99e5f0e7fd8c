"""How a header is stored: site lists once, few bytes, and as many files in one as anybody has."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptzap import format
from conceptzap.edit import Edit, Erasure, Gate, Raw, stack
from conceptzap.errors import FormatError
from conceptzap.format import container, layout
from tests.samples import base, header, tensor

PLACES = [
    *(f"down_blocks.{block}.attentions.{at}" for block in (0, 1, 2) for at in (0, 1)),
    "mid_block.attentions.0",
    *(f"up_blocks.{block}.attentions.{at}" for block in (1, 2, 3) for at in (0, 1, 2)),
]
CROSS = tuple(f"unet.{place}.transformer_blocks.0.attn2" for place in PLACES)  # all of SD 1.x
CROSS_KV = tuple(f"{site}.to_{letter}" for site in CROSS for letter in "kv")
WIDTH = 768
VERSIONS = {"conceptzap": "1.0.0", "torch": "2.13.0+cpu", "diffusers": "0.42.1", "transformers": "5.1.0"}
SCORES = {
    name: {"value": 0.916667, "low": 0.741667, "high": 0.976667, "n": 24, "better": "lower", "seeds": [0]}
    for name in ("leak", "object_kept", "preservation")
}


def measured(edits: tuple[Edit, ...], config: dict, number: int = 0) -> Erasure:
    """With all that `erase` writes about edits that act together."""
    sites = sorted({site for edit in edits for site in edit.sites})
    names = sorted(edit.name for edit in edits)
    change = {site: round(0.1234 + 0.0101 * place, 4) for place, site in enumerate(sites)}
    test = {"edits": names, "prompt": "a painting by Van Gogh", "seed": 20240319, "change": change}
    made_on = replace(base(), id="stable-diffusion-v1-5/stable-diffusion-v1-5", revision="4" * 40)
    record = {"method": "none", "config": config, "keep": [], "seed": number, "versions": VERSIONS}
    concept = "Van Gogh" if not number else f"artist {number}"
    return Erasure(
        header(
            title=concept,
            concepts=(concept,),
            base=made_on,
            made=(record,),
            scores=SCORES,
            canary={names[0]: test},
        ),
        edits,
    )


def learned(number: int = 0, width: int = WIDTH) -> Erasure:
    """Learned tokens and a closed-form edit behind one gate, at every cross-attention of SD 1.x."""
    rates = {"rate": 0.0, "low": 0.0, "high": 0.002395, "n": 1600}
    params = {"threshold": 5.152385 + number, "false_open": rates, "false_shut": rates}
    gate = Gate("match", params, {"query": tensor("F16", 4, width), "mean": tensor("F16", width)})
    rows = {f"prompt_{letter}": tensor("F16", 8, width) for letter in "kv"}
    pair = {"into": tensor("F16", width, 12), "down": tensor("F16", 12, width)}
    edits = (Edit("tokens", CROSS, rows, gates=(gate,)), Edit("weight", CROSS_KV, pair, gates=(gate,)))
    config = {f"setting_{letter}": 0.05 for letter in "abcdefghijkl"}
    return measured(edits, config, number)


def closed_form() -> Erasure:
    pair = {"into": tensor("F16", WIDTH, 12), "down": tensor("F16", 12, WIDTH)}
    config = {"rank": 12, "ridge": 0.05, "keep_scale": 4.0, "keep_prompts": 400}
    return measured((Edit("weight", CROSS_KV, pair),), config)


@pytest.mark.parametrize(("make", "most"), [(learned, 3500), (closed_form, 2500)])
def test_a_header_is_small(make, most):
    """All of a file that is no tensor, at the shape of SD 1.5: it was 9.6 and 6.6 kB."""
    data = format.dumps(make())
    assert int.from_bytes(data[:8], "little") <= most


def test_every_list_of_sites_is_stored_once():
    text = container.split(format.dumps(learned()))[0]["lprompt"]
    assert text.count("mid_block") == 2  # one for the attentions, one for their keys and values
    both = stack([format.seal(learned()), format.seal(learned(1))])
    assert container.split(format.dumps(both))[0]["lprompt"].count("mid_block") == 2


def test_inspect_shows_every_site(tmp_path):
    format.save(learned(), tmp_path / "a.lprompt.safetensors")
    info = format.read_header(tmp_path / "a.lprompt.safetensors")
    assert sorted(edit["sites"] for edit in info.edits) == sorted([sorted(CROSS), sorted(CROSS_KV)])
    (test,) = info.header.canary.values()
    assert sorted(test["change"]) == sorted((*CROSS, *CROSS_KV))


def test_what_lists_are_folded_into():
    assert layout.fold(CROSS_KV) == [
        "unet.down_blocks.{0,1,2}.attentions.{0,1}",
        "unet.mid_block.attentions.0",
        "unet.up_blocks.{1,2,3}.attentions.{0,1,2}",
        ".transformer_blocks.0.attn2.{to_k,to_v}",
    ]
    assert layout.fold(["unet.conv_in"]) == ["unet.conv_in"]
    assert layout.fold(["unet.a", "unet.a.0"]) == ["unet.a", "unet.a.0"]


PARTS = st.lists(st.sampled_from(["0", "1", "10", "to_k", "a"]), min_size=1, max_size=4).map(".".join)


@settings(max_examples=200, deadline=None)
@given(st.sets(PARTS.map("unet.{}".format), max_size=12))
def test_folding_is_exact_and_the_same_for_every_order(sites):
    folded = layout.fold(sites)
    assert layout.unfold(folded) == sorted(sites)
    assert layout.fold(sorted(sites)) == layout.fold(sorted(sites, reverse=True)) == folded


def test_a_thousand_files_fit_into_one():
    """Each of two edits, a gate and a self-test at every cross-attention; all of them come back."""
    parts = [replace(learned(number, width=2), digest=f"{number:064x}") for number in range(1000)]
    both = stack(parts)
    read = format.parse(format.dumps(both))
    assert read.header == both.header and len(read.edits) == 2000
    assert [edit.name for edit in read.edits] == [edit.name for edit in both.edits]
    assert read.header.parents == tuple(sorted(part.digest for part in parts))


def test_so_many_that_reading_would_not_end_are_refused():
    """A small header may name its lists so often that hashing them all would take for ever."""
    sites = [f"unet.{a}.{b}" for a in range(200) for b in range(200)]
    values = {"up": Raw("F16", (1, 1), bytes(2)), "down": Raw("F16", (1, 1), bytes(2))}
    edits = tuple(Edit("weight", tuple(sites), values, scale=0.01 * number) for number in range(30))
    with pytest.raises(FormatError, match="more than 1048576 places"):
        format.dumps(Erasure(header(), edits))
