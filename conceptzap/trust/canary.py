"""The self-test in every file: does each edit change each of its modules by as much as when it was made?

`make` runs the UNet once on a fixed latent with the concept's own prompt and notes, for every
module, the size of the change (rms of edited - plain output on the input it got). `check` repeats
that after loading and compares with the stored numbers, so a hook that is missing, doubled or
without effect is found before any picture is drawn. An erasure that was made weaker or stronger is
tested at strength 1.

Edits of modules that read the text (cross-attentions, SDXL's embedding of pooled text), and nothing else,
are tested there alone: the UNet is called, its gates are read and its books kept, but of its modules only
these run, on fixed activations, and of the text only its beginning, which a causal encoder reads as it reads
it in the whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from conceptzap.base import PREFIX, Base, Cond, find_module
from conceptzap.base.modules import plain
from conceptzap.edit import Edit, Erasure, Json, token_count
from conceptzap.errors import RefusedError, ran_out_of_memory
from conceptzap.format.tree import RUNS
from conceptzap.runtime import adapters, guides
from conceptzap.runtime.attach import attached
from conceptzap.runtime.gates import SIGHT

SEED = 20240319
TIMESTEP = 500
ROWS = 8  # self-tests in one UNet call
CROSS, POOLED = ".attn2", f"{PREFIX}add_embedding."
KEYS = (f"{CROSS}.to_k", f"{CROSS}.to_v")
POSITIONS = 16  # of the activations where what reads text runs alone
STEP, OLD_STEP = 8, 16  # the length of its text there is a multiple of this; where a file does not say it
DIGITS = 4
# relative, by the dtype of the UNet: half precision rounds every activation
TOLERANCE = {torch.float32: 0.02, torch.float16: 0.15, torch.bfloat16: 0.3}


class Case(NamedTuple):
    """Edits that are tested together, and the prompt that opens their gates.

    `length`: so much of its text is read, and of the UNet only what reads text runs; 0: all of both.
    """

    edits: tuple[Edit, ...]
    prompt: str
    length: int = 0


class _Watch:
    """Input and output of one module, seen from outside every other hook, at its last call.

    A gate that looks has the UNet run anew once it opens; the calls beside it, for texts of a guide's
    own, do not count.
    """

    def __init__(self, module: nn.Module, path: str) -> None:
        self.module, self.path = module, path
        self.given: tuple[tuple, dict[str, Any]] | None = None
        self.output: Tensor | None = None
        self.handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            module.register_forward_hook(self._after),
        ]

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not guides.BESIDE.get():
            self.given = args, kwargs

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not guides.BESIDE.get():
            self.output = self._tensor(output)

    def _tensor(self, output: Any) -> Tensor:
        return adapters.made(self.path, getattr(output, "sample", output))  # of the UNet as a whole, too

    def change(self) -> tuple[list[float], torch.Size]:
        """Per row the sum of squares of what the edits added to the module's own output, and its shape.

        Call it with the edits off.
        """
        args, kwargs = self.given or ((), {})
        plain, edited = self._tensor(self.module(*args, **kwargs)), self.output
        if edited is None:
            return [0.0] * len(plain), plain.shape
        change = (edited[:, : plain.shape[1]] - plain).float()  # [rows, ...]
        return change.pow(2).flatten(1).sum(1).tolist(), plain.shape

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _timestep(edits: Iterable[Edit]) -> int:
    """A timestep at which every window is open and every guide steers, as far as there is one, and every
    `sight` gate looks.

    What these look at there is the text's alone: the latents are noise, as they are at its first time.
    """
    edits = list(edits)
    gates = [gate for edit in edits for gate in edit.gates]
    windows = [gate.params for gate in gates if gate.kind == "window"]
    first = [int(gate.tensors["times"].max()) for gate in gates if gate.kind == "sight"]
    warm = [edit.params["below"] for edit in edits if "below" in edit.params]
    low = max([0, *(window["low"] for window in windows)])
    high = min([999, *(window["high"] for window in windows), *warm])
    return min(max(min(first, default=TIMESTEP), low), high)


def _module(base: Base, site: str) -> nn.Module:
    return base.unet if site == guides.SITE else find_module(base, site)


def measure(base: Base, cases: Sequence[Case]) -> list[dict[str, float]]:
    """For each case: module path -> rms change, for all modules of its edits, attached together.

    One UNet call for every `ROWS` cases in a row that run alike, each a row of its own that only its own
    edits act on; fewer where memory runs out.
    """
    rows, found = ROWS, []
    while len(found) < len(cases):
        some = cases[len(found) : len(found) + rows]
        try:
            found += _together(base, [*itertools.takewhile(lambda case: case.length == some[0].length, some)])
        except Exception as error:
            if rows == 1 or not ran_out_of_memory(error):
                raise
            rows //= 2
    return found


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # one call, for which nobody waits until it is compiled
def _together(base: Base, cases: Sequence[Case]) -> list[dict[str, float]]:
    edits = list({edit.name: edit for case in cases for edit in case.edits if edit.scale}.values())
    n, below = len(cases), len(cases) if _pairs(edits) else 0  # unconditional rows come before those tested
    names = [set()] * below + [{edit.name for edit in case.edits} for case in cases]
    only = torch.tensor([[float(edit.name in here) for here in names] for edit in edits])  # [edits, rows]
    times = torch.tensor([_timestep(case.edits) for case in cases]).repeat(1 + bool(below))
    sites = dict.fromkeys(site for edit in edits for site in edit.sites)
    inside = _only_readers(base, sites) if cases[0].length else nullcontext()
    guidance = guides.Guidance(lambda rows: below).told() if below else nullcontext()
    with attached(base, edits, only) as receipt, inside, guidance:
        watches = {site: _Watch(_module(base, site), site) for site in sites}
        try:
            ids = base.token_ids([*[""] * below, *(case.prompt for case in cases)])
            # by the text encoders under the edits, of which each row has its own
            cond = base.encode_ids([each[:, : cases[0].length or None] for each in ids])
            if below and base.zero_negative:
                cond = Cond.cat([cond[list(range(n))].zeroed(), cond[list(range(n, 2 * n))]])
            base.eps(base.noise([SEED] * (below + n)), times, cond)
        finally:
            for watch in watches.values():
                watch.remove()
    changes = {site: watch.change() for site, watch in watches.items()}
    length = cond.states.shape[1]
    return [
        {
            site: _rms(changes[site], row, site, length + _learned(case.edits, site, receipt.fired([row])))
            if site in changes
            else 0.0
            for site in sorted({site for edit in case.edits for site in edit.sites})
        }
        for row, case in enumerate(cases, below)
    ]


def _pairs(edits: Iterable[Edit]) -> bool:
    """Whether a gate reads the rows with the prompt beside those without."""
    gates = (gate for edit in edits for gate in edit.gates)
    return any(gate.kind == SIGHT and "alone" in gate.tensors for gate in gates)


@contextmanager
def _only_readers(base: Base, sites: Iterable[str]) -> Iterator[None]:
    """Of the UNet's modules only those that read the text at these sites run, on normal activations."""
    crosses = dict.fromkeys(f"{site.partition(CROSS)[0]}{CROSS}" for site in sites if CROSS in site)
    pooled = any(site.startswith(POOLED) for site in sites)
    unet: Any = plain(base.unet)
    place = "_old_forward" if hasattr(unet, "_hf_hook") else "forward"  # inside what moves its weights
    before = vars(unet).get(place)

    def forward(
        sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: Any = None
    ) -> SimpleNamespace:
        if pooled:
            unet.get_aug_embed(sample, encoder_hidden_states, added_cond_kwargs)
        for path in crosses:
            module: Any = find_module(base, path)
            generator = torch.Generator().manual_seed(SEED)  # whatever else is tested
            one = torch.randn(POSITIONS, module.query_dim, generator=generator)
            hidden = one.to(sample).expand(len(sample), -1, -1)  # [rows, POSITIONS, c]
            module(hidden, encoder_hidden_states=encoder_hidden_states)
        return SimpleNamespace(sample=sample[:, : unet.config.out_channels])

    setattr(unet, place, forward)
    try:
        yield
    finally:
        delattr(unet, place) if before is None else setattr(unet, place, before)


def _case(base: Base, edits: Iterable[Edit], prompt: str, step: int = STEP) -> Case:
    """Edits that can be tested in the modules that read their text, by these alone, are."""
    edits = tuple(edits)
    if not _read_text_alone(edits):
        return Case(edits, prompt)
    needed = base.token_count(prompt) + 2  # start and end
    return Case(edits, prompt, min(math.ceil(needed / step) * step, base.max_tokens + 2))


def _read_text_alone(edits: Iterable[Edit]) -> bool:
    return all(
        edit.op in ("tokens", "weight")
        and not adapters.is_adapter(edit)
        and all(f"{CROSS}." in f"{site}." or site.startswith(POOLED) for site in edit.sites)
        and all(gate.kind != SIGHT for gate in edit.gates)
        for edit in edits
    )


def _rms(change: tuple[list[float], torch.Size], row: int, site: str, length: int) -> float:
    """Over the row's own numbers: keys and values of other rows' learned tokens are 0 and do not count."""
    squares, shape = change
    size = math.prod(shape[1:])
    if site.endswith(KEYS):
        size = length * shape[-1]
    return math.sqrt(squares[row] / size)


def _learned(edits: Iterable[Edit], site: str, fired: frozenset[str]) -> int:
    """Learned tokens that the open edits put behind the text of the cross-attention around a site."""
    cross = site.removesuffix(".to_k").removesuffix(".to_v")
    tokens = [e for e in edits if e.op == "tokens" and cross in e.sites and e.name in fired]
    return sum(token_count(edit) for edit in tokens)


def acting(base: Base, edits: Sequence[Edit], prompt: str) -> list[Edit]:
    """Those of the edits that change something at each of their sites for a prompt, each by itself.

    An edit that looks at activations may find nothing in them: where no output leans to a direction,
    what turns it away does nothing.
    """
    found = measure(base, [_case(base, [edit], prompt) for edit in edits])
    return [edit for edit, changes in zip(edits, found, strict=True) if all(v > 0 for v in changes.values())]


def make(base: Base, edits: Sequence[Edit], prompt: str) -> dict[str, Json]:
    """The header's canary of edits that belong together, keyed by the name of the first of them.

    Raises `RefusedError` if one of them changes nothing for the concept's own prompt.
    """
    case = _case(base, edits, prompt)
    found = measure(base, [case])[0]
    changes = {site: _round(value) for site, value in found.items()}
    idle = [site for site, value in changes.items() if not value > 0]
    if idle:
        raise RefusedError(
            f"the edit changes nothing at {idle[0]} for the prompt {prompt!r}",
            "its gate stays shut or it was not trained; try more --steps or another concept",
        )
    names = sorted(edit.name for edit in edits)
    test: dict[str, Json] = {"edits": names, "prompt": prompt, "seed": SEED, "change": changes}
    return {names[0]: test | ({"runs": RUNS, "length": case.length} if case.length else {})}


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def check(base: Base, erasure: Erasure, *, exact: bool = True) -> None:
    """Raise `RefusedError` unless every edit of a loaded erasure acts here as its canary says.

    `exact` False, for another checkpoint of the architecture, only asks that each one acts.
    """
    check_all(base, [(erasure, exact)])


def check_all(base: Base, erasures: Iterable[tuple[Erasure, bool]]) -> None:
    """`check` for many, with `exact` of each: many self-tests to a UNet call."""
    tolerance = TOLERANCE.get(base.dtype, 0.3)
    tests = [(case, test, exact) for one, exact in erasures for case, test in _cases(base, one)]
    found = measure(base, [case for case, _, _ in tests])
    for (_, test, exact), changes in zip(tests, found, strict=True):
        _compare(changes, test["change"], tolerance if exact else None)


def _cases(base: Base, erasure: Erasure) -> list[tuple[Case, Mapping[str, Any]]]:
    """The self-tests of an erasure, with the edits as they were tested: at strength 1, if not as they are."""
    made = {edit.name: edit for edit in erasure.edits if edit.scale}
    whole = {edit.name: edit for edit in (replace(edit, scale=1.0) for edit in made.values())} | made
    # a test that names no edits tests none: the format lets very old files hold such ones
    tests = [test for test in erasure.header.canary.values() if "edits" in test]
    covered = {name for test in tests for name in test["edits"]}
    for edit in erasure.edits:
        if not edit.scale or not {edit.name, replace(edit, scale=1.0).name} & covered:
            raise RefusedError(
                f"{erasure.header.title!r} has no self-test for its edit {edit.name}",
                "make the file again with this version of conceptzap",
            )
    cases = []
    for test in tests:
        case = _case(base, (whole[name] for name in test["edits"] if name in whole), test["prompt"], OLD_STEP)
        # older ones were made by a run of the whole, which forged ones get, too
        runs = case.length and test.get("runs") == RUNS
        length = min(test.get("length", case.length), base.max_tokens + 2) if runs else 0
        cases.append((case._replace(length=length), test))
    return cases


def _compare(found: Mapping[str, float], wanted: Mapping[str, float], tolerance: float | None) -> None:
    for site in sorted({*found, *wanted}):
        have, value = found.get(site, 0.0), wanted.get(site, 0.0)
        same = tolerance is None or math.isclose(have, value, rel_tol=tolerance)
        if not (same and have > 0):
            raise RefusedError(
                f"self-test failed at {site}: its output changed by {have:.4g}, {value:.4g} was expected",
                "something disturbs the model; load it afresh and attach again",
            )
