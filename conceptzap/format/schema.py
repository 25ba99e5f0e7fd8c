"""What ops and gates may carry: slots, parameters, dtypes. One table for reader, writer and machinery.

A slot set lists the tensors that must be there together; `optional` ones may come along. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# safetensors name -> bytes an element; floats only, but for the masks of pruning
DTYPES = {"F32": 4, "F16": 2, "BOOL": 1, "U8": 1, "I8": 1}
PACKED = {"bits"}  # slots that hold bytes, and no others do
SCALED = {"query": "scale"}  # slots of whole numbers, where there is the slot of their scales
PATHS = {"beside"}  # parameters that list module paths
NAMES = {"told"}  # parameters that list gates; other lists are of whole numbers


@dataclass(frozen=True)
class Kind:
    """Allowed slot sets (one of them, whole), optional slots, and parameter name -> JSON types.

    `required` parameters must be there; `choices` lists the words a parameter may be, `ranges` the
    least and largest of a number, `needs` what a word of a parameter asks for beside it.
    """

    slots: tuple[frozenset[str], ...]
    optional: frozenset[str] = frozenset()
    params: dict[str, tuple[type, ...]] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    needs: dict[tuple[str, str], frozenset[str]] = field(default_factory=dict)

    def accepts(self, slots: frozenset[str]) -> bool:
        return any(want <= slots <= want | self.optional for want in self.slots)


def _sets(*groups: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(group.split()) for group in groups)


SAFE = ("guidance", "threshold", "momentum", "beta")  # numbers of Safe Latent Diffusion
ROWS = ("conditional",)  # the rows of a UNet call that an edit is confined to

OPS = {
    # prompt_*: [n, context width], shared by all sites, prompt: keys and values of the same; tokens_*:
    # [n, inner width] in K/V space; without [n, context width]: what prompt is in unconditional rows, where
    # somebody says which these are; such an edit is open in both rows of a picture if in the prompt's.
    # alone: they stand in place of the text, whose bias is log(1 - strength)
    "tokens": Kind(
        _sets("prompt", "prompt without", "prompt_k prompt_v", "tokens_k tokens_v"),
        params={"alone": (bool,), "rows": (str,)},
        choices={"rows": ROWS},
    ),
    # up [out, r] (conv: [out, r, 1, 1]), down [r, in] (conv: [r, in, kh, kw]); into [in, r];
    # keep [out, in, ...], or [in] over input features; bits [out, bytes]: such a mask, eight to a byte
    "weight": Kind(
        _sets("up down", "into down", "delta", "keep", "bits"),
        params={"rows": (str,)},
        choices={"rows": ROWS},
    ),
    # y + up (gain o phi(down (x - center) + bias)), at any module; written into y, or into x before it.
    # gain, threshold [r], or [times, r] of which the nearest of times [times] holds; see `PHI`
    "adapter": Kind(
        _sets("up down", "up down query gate", "prompt"),
        frozenset({"bias", "center", "gain", "threshold", "times"}),
        {
            "phi": (str,), "k": (int,), "reads": (str,), "writes": (str,), "rows": (str,),
            "slope": (float,), "shift": (float,), "height": (float,),
        },
        choices={
            "phi": ("none", "relu", "gelu", "topk", "attend", "project"),
            "reads": ("x", "y"), "writes": ("x", "y"), "rows": ROWS,
        },
        ranges={"k": (1, 2**20)},
    ),
    # context [texts, length, width], pooled [texts, width] (SDXL); signal [times]: sqrt(alpha-bar), where
    # the UNet predicts v. `below`: steers at timesteps up to this one
    "guide": Kind(
        _sets("context"),
        frozenset({"pooled", "signal"}),
        {"rule": (str,), "below": (int,), **dict.fromkeys(SAFE, (float,))},
        frozenset({"rule"}),
        {"rule": ("safe", "swap")},
        {"below": (0, 2**20), "guidance": (0, 2**20), "momentum": (0, 1), "beta": (0, 1)},
        {("rule", "safe"): frozenset({"below", *SAFE})},
    ),
}

# what a phi needs besides: slots that go with it and with no other, and parameters
PHI = {
    "topk": (frozenset({"up", "down"}), frozenset({"k"})),
    # query [q, in], gate [in]
    "attend": (frozenset({"up", "down", "query", "gate"}), frozenset()),
    # prompt [concepts, positions, in], whose values are what a layer of text is made orthogonal to
    "project": (frozenset({"prompt"}), frozenset({"slope", "shift", "height"})),
}
PLAIN_PHI = (frozenset({"up", "down"}), frozenset())

GATES = {
    # open where max_j max_i q_i . unit(c_j - mean) > threshold, c_j the text states of a row
    "match": Kind(
        _sets("query mean"),
        # parts: widths of the encoders side by side in the states, each brought to unit length
        params={"threshold": (float,), "false_open": (dict,), "false_shut": (dict,), "parts": (list,)},
        required=frozenset({"threshold"}),
    ),
    # between 0 at the threshold and 1 at `full`, of the same score: ((score - threshold) / (full -
    # threshold)) ** power
    "similar": Kind(
        _sets("query mean"),
        params={"threshold": (float,), "full": (float,), "power": (float,), "parts": (list,)},
        required=frozenset({"threshold", "full"}),
    ),
    # open where low <= t <= high
    "window": Kind(
        _sets(""), params={"low": (int,), "high": (int,)}, required=frozenset({"low", "high"})
    ),
    # factor by linear interpolation over the timestep: values [times], or [times, sites] in their order
    "curve": Kind(_sets("times values")),
    # open, for the rest of the run, from where q(t) . u - offset(t) of any probe is above the threshold at a
    # t that is not below low, u the unit means of the outputs of the site and of those beside it, joined;
    # times [k], query [k, probes, channels of all], offset [k, probes], or without probes where there is one;
    # knots [m]: the times of the queries, where they are not those of the offsets, query [m, ...];
    # scale [m, probes]: by which queries of whole numbers, -127 to 127, are multiplied;
    # eased: the offset of rows whose text opens one of the gates that are told by name;
    # alone: the offset of rows without an unconditional one of the same picture; with it u is a pair's, each
    # row's own means and behind them those of its unconditional one, without which they are its own again
    "sight": Kind(
        _sets("times query offset"),
        frozenset({"knots", "scale", "eased", "alone"}),
        params={
            "site": (str,), "beside": (list,), "threshold": (float,), "low": (int,), "told": (list,),
            "false_open": (dict,), "false_shut": (dict,),
        },
        required=frozenset({"site", "threshold"}),
        ranges={"low": (0, 999)},
    ),
    # factor per text position (K/V weight edits only)
    "token": Kind(
        _sets("query mean"),
        params={"threshold": (float,), "parts": (list,)},
        required=frozenset({"threshold"}),
    ),
}
