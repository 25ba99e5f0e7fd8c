"""Pictures under erasures: requests are checked at once, the base when the first is drawn."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conceptzap.edit import Json, sort_edits
from conceptzap.errors import UsageError, escape
from conceptzap.format import naming
from conceptzap.report import Report
from conceptzap.result import Settings, check_seed
from conceptzap.trust import admission
from conceptzap.trust.admission import Asked, Loaded

if TYPE_CHECKING:
    import numpy as np

    from conceptzap.base import Base
    from conceptzap.runtime.sampler import Drawing
    from conceptzap.trust.policy import Policy


@dataclass(frozen=True)
class Picture:
    """One drawn picture, uint8 [h, w, 3], with what every PNG of it says in `text`.

    `erasures`: path (None for a value), digest, strength, and whether it was ever open, of each.
    """

    array: np.ndarray
    prompt: str
    seed: int
    erasures: tuple[Mapping[str, Json], ...]
    text: Mapping[str, str]


@dataclass(frozen=True)
class Request:
    """Pictures that were asked for: `pairs` of prompt and seed, `look` the settings given."""

    pairs: tuple[tuple[str, int], ...]
    look: Mapping[str, Any]
    erasures: tuple[Loaded, ...]
    policy: Policy | None
    strict: bool

    def settings(self, base: Base) -> Settings:
        return replace(usual(base), **self.look)


def usual(base: Base) -> Settings:
    """The settings a base is drawn with when nobody says: the demo's own, or Stable Diffusion's."""
    return Settings() if base.is_demo else Settings(steps=30, guidance=7.5)


def described(base: Base) -> str:
    """What was found: `demo: sd1, epsilon, cpu float32`."""
    dtype = str(base.dtype).removeprefix("torch.")
    return f"{base.id}: {base.family}, {base.prediction}, {base.device} {dtype}"


def request(
    prompts: Sequence[str] | str,
    *,
    seed: int,
    count: int,
    look: Mapping[str, Any],
    erasures: Iterable[Asked],
    policy: Path | str | None,
    strict: bool,
) -> Request:
    """A request whose files are read and whose numbers are in range; raises like `api.generate`."""
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not prompts or count < 1:
        raise UsageError("no picture was asked for", 'for example: conceptzap generate "a cat"')
    for prompt in prompts:
        if naming.is_erasure(prompt):
            hint = f"draw with it by --with {escape(prompt)}, one --with for each"
            raise UsageError(f"the prompt {escape(prompt)!r} is an erasure's file", hint)
    check_seed(check_seed(seed) + count - 1)
    look = {name: value for name, value in look.items() if value is not None}
    Settings(**look)
    return Request(
        pairs=tuple((prompt, seed + k) for prompt in prompts for k in range(count)),
        look=look,
        erasures=admission.load_all(erasures),
        policy=None if policy is None else _policy(Path(policy)),
        strict=strict,
    )


def _policy(path: Path) -> Policy:
    from conceptzap.trust import policy

    found = policy.read(path)
    policy.verify_files(found)
    return found


def pictures(
    asked: Request,
    base: str | Base,
    report: Report,
    *,
    device: str = "auto",
    dtype: str = "auto",
    prediction: str | None = None,
) -> Iterator[Picture]:
    """Load the base if it is a name, admit every erasure, then draw one picture after the other."""
    from conceptzap.base import load_base
    from conceptzap.runtime import sampler

    here = load_base(base, device, dtype, prediction) if isinstance(base, str) else base
    report.phase(described(here))
    active = _under_policy(asked.policy, here, asked.erasures) if asked.policy else asked.erasures
    strict = asked.strict or asked.policy is not None
    _note_prompts(here, asked, report)
    foreign = admission.admit_all(here, [one.erasure for one in active], strict, report)
    settings = asked.settings(here)
    common = _facts(here, settings, any(foreign), asked.policy)
    edits = sort_edits(edit for one in active for edit in one.edits)
    prompts, seeds = ([pair[i] for pair in asked.pairs] for i in (0, 1))
    for drawn in sampler.drawings(here, prompts, seeds, settings, edits):
        yield _picture(drawn, active, common)


def _note_prompts(base: Base, asked: Request, report: Report) -> None:
    for prompt in dict.fromkeys(prompt for prompt, _ in asked.pairs):
        if not prompt.strip():
            report.note("the empty prompt asks for nothing in particular")
        if left_out := base.cut(prompt):
            report.warn(f"only {base.max_tokens} tokens are read, without: {escape(left_out)}")


def _under_policy(policy: Policy, base: Base, given: Sequence[Loaded]) -> tuple[Loaded, ...]:
    """The policy's own files; what was given besides must be among them, as made."""
    from conceptzap.trust import policy as policies

    pinned = policies.enforce(policy, base)
    if given:
        policies.check_erasures(policy, [one.erasure.scaled(one.strength) for one in given])
    paths = policies.verify_files(policy)
    return tuple(Loaded(erasure, path) for erasure, path in zip(pinned, paths, strict=True))


def _picture(drawn: Drawing, active: Sequence[Loaded], common: Mapping[str, str]) -> Picture:
    records = tuple(_record(one, drawn.fired) for one in active)
    named = [{key: value for key, value in one.items() if key != "path"} for one in records]
    own = {"prompt": drawn.prompt, "seed": str(drawn.seed), "erasures": json.dumps(named)}
    return Picture(drawn.picture.numpy(), drawn.prompt, drawn.seed, records, {**common, **own})


def _record(one: Loaded, fired: frozenset[str]) -> dict[str, Json]:
    return {
        "path": str(one.path) if one.path else None,
        "digest": one.erasure.digest,
        "strength": one.strength,
        "fired": any(edit.name in fired for edit in one.edits),
    }


def _facts(base: Base, settings: Settings, foreign: bool, policy: Policy | None) -> dict[str, str]:
    """What the PNGs of one run have in common."""
    import torch

    import conceptzap

    place = f"{base.device.type} {base.dtype}"
    facts = {
        "software": f"conceptzap {conceptzap.__version__}, torch {torch.__version__}",
        "base": f"{base.id}@{base.revision}" if base.revision else base.id,
        "fingerprint": json.dumps(dict(base.fingerprint(()))),
        "settings": json.dumps(settings.record()),
        "device": f"{place}, {torch.get_num_threads()} threads, {platform.machine()}",
    }
    if foreign:
        facts["warning"] = "an erasure was made and measured on another checkpoint"
    return facts | ({"policy": policy.digest} if policy else {})
