"""Pictures under erasures: requests are checked at once, the base when the first is drawn."""

from __future__ import annotations

import itertools
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from conceptzap.edit import Json, sort_edits
from conceptzap.errors import RefusedError, UsageError, escape
from conceptzap.format import naming
from conceptzap.report import Report
from conceptzap.result import Settings, check_seed
from conceptzap.trust import admission
from conceptzap.trust.admission import Asked, Loaded
from conceptzap.verbs import doubts
from conceptzap.words import with_article

if TYPE_CHECKING:
    import numpy as np
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from conceptzap.base import Base
    from conceptzap.runtime.sampler import Drawing
    from conceptzap.trust.policy import Policy

    AnyBase = str | Path | Base | DiffusionPipeline

WORDS = ("negative", "scheduler")  # settings that are texts
# samplers, as stable-diffusion-webui calls them
CALLED = {"ddim": "DDIM", "euler": "Euler", "dpm++": "DPM++ 2M"}


@dataclass(frozen=True, repr=False)
class Picture:
    """One drawn picture, uint8 [h, w, 3], with what every PNG of it says in `text`.

    `erasures`: path (None for a value), digest, strength, and whether it was ever open, of each.
    A notebook shows the picture itself.
    """

    array: np.ndarray
    prompt: str
    seed: int
    erasures: tuple[Mapping[str, Json], ...]
    text: Mapping[str, str]

    @property
    def image(self) -> Image:
        """The picture as Pillow's, RGB."""
        from PIL import Image

        return Image.fromarray(self.array)

    def save(self, path: Path | str, force: bool = False) -> Path:
        """Write it as a PNG that says how it was made; raises `UsageError` where the file exists."""
        from conceptzap.format.pictures import save_png

        target = naming.place(path)
        save_png(target, self.array, self.text, force=force)
        return target

    def _repr_png_(self) -> bytes:
        from conceptzap.format.pictures import encode_png

        return encode_png(self.array, self.text)

    def __repr__(self) -> str:
        height, width = self.array.shape[:2]
        fired = sum(bool(one["fired"]) for one in self.erasures)
        changed = f", changed by {fired} of {len(self.erasures)}" if self.erasures else ""
        return f"Picture({escape(self.prompt)!r}, seed {self.seed}, {width} x {height} px{changed})"


@dataclass(frozen=True)
class Request:
    """Pictures that were asked for: `pairs` of prompt and seed, `look` the settings given."""

    pairs: tuple[tuple[str, int], ...]
    look: Mapping[str, Any]
    erasures: tuple[Loaded, ...]
    policy: Policy | None
    strict: bool
    strengths: tuple[float, ...] = (1.0,)

    def settings(self, base: Base) -> Settings:
        return replace(usual(base), **self.look)


def usual(base: Base) -> Settings:
    """The settings a base is drawn with when nobody says: the demo's own, or Stable Diffusion's."""
    return Settings() if base.is_demo else Settings(steps=30, guidance=7.5)


def described(base: Base) -> str:
    """What was found: `demo: sd1, epsilon, cpu float32`."""
    dtype = str(base.dtype).removeprefix("torch.")
    return f"{base.id}: {base.family}, {base.prediction}, {base.device} {dtype}"


def find_base(
    base: AnyBase, device: str = "auto", dtype: str = "auto", prediction: str | None = None
) -> Base:
    """The base that a name, a path, a diffusers pipeline or a `Base` stands for.

    A pipeline and a `Base` stay where they are and as they are; `device` and the rest are for names.
    """
    from conceptzap.base import Base, from_pipeline, load_base

    if isinstance(base, (str, os.PathLike)):
        return load_base(os.fspath(base), device, dtype, prediction)
    if isinstance(base, Base):
        return base
    if hasattr(base, "unet"):
        return from_pipeline(base)
    kind = type(base).__name__
    raise UsageError(f"a base cannot be made of {with_article(kind)}", "give a name or a pipeline")


def request(
    prompts: Sequence[str] | str,
    *,
    seed: int,
    count: int,
    look: Mapping[str, Any],
    erasures: Iterable[Asked],
    policy: Path | str | None,
    strict: bool,
    strengths: Iterable[float] = (1.0,),
) -> Request:
    """A request whose files are read and whose numbers are in range; raises like `api.generate`."""
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not prompts or isinstance(count, int) and count < 1:
        raise UsageError("no picture was asked for", 'for example: conceptzap generate "a cat"')
    for prompt in (*prompts, look.get("negative") or ""):
        _check_prompt(prompt)
    _check_numbers({"seed": seed, "count": count, **look})
    check_seed(check_seed(seed) + count - 1)
    look = {name: value for name, value in look.items() if value is not None}
    Settings(**look)
    loaded = admission.load_all(erasures)
    strengths = tuple(strengths)
    for one, part in itertools.product(loaded, strengths):
        admission.check_strength(one.strength * admission.check_strength(part))
    if policy is not None and strengths != (1.0,):
        hint = "leave the policy or the other strengths out"
        raise RefusedError("a policy's erasures are in force at the strength they were made at", hint)
    return Request(
        pairs=tuple((prompt, seed + k) for prompt in prompts for k in range(count)),
        look=look,
        erasures=loaded,
        policy=None if policy is None else _policy(Path(policy)),
        strict=strict,
        strengths=strengths,
    )


def _check_prompt(prompt: str) -> None:
    if not isinstance(prompt, str):
        raise UsageError(f"the prompt {escape(prompt)!r} is no text", "give a text, or a list of texts")
    if naming.is_erasure(prompt):
        hint = f"draw with it by --with {escape(prompt)}, one --with for each"
        raise UsageError(f"the prompt {escape(prompt)!r} is an erasure's file", hint)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        hint = "write it in UTF-8"
        raise UsageError(f"the prompt {escape(prompt)!r} is not UTF-8 text", hint) from error


def _check_numbers(numbers: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a text, or a fraction, where a number is counted with."""
    for name, value in numbers.items():
        kind = Real if name == "guidance" else Integral
        if name in WORDS or value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, kind):
            what = "number" if kind is Real else "whole number"
            raise UsageError(f"{name}={value!r} is not a {what}", f"give {name} without quotes")


def _policy(path: Path) -> Policy:
    from conceptzap.trust import policy

    found = policy.read(path)
    policy.verify_files(found)
    return found


def pictures(
    asked: Request,
    base: AnyBase,
    report: Report,
    *,
    device: str = "auto",
    dtype: str = "auto",
    prediction: str | None = None,
) -> Iterator[Picture]:
    """Load the base if it is a name, admit every erasure, then draw one picture after the other."""
    from conceptzap.runtime import sampler

    here = find_base(base, device, dtype, prediction)
    report.phase(described(here))
    active = _under_policy(asked.policy, here, asked.erasures) if asked.policy else asked.erasures
    strict = asked.strict or asked.policy is not None
    _note_prompts(here, asked, report)
    foreign = admission.admit_all(here, [one.erasure for one in active], strict, report)
    settings = asked.settings(here)
    common = _facts(here, settings, any(foreign), asked.policy)
    prompts, seeds = ([pair[i] for pair in asked.pairs] for i in (0, 1))
    for part in asked.strengths:
        now = [replace(one, strength=one.strength * part) for one in active]
        edits = sort_edits(edit for one in now for edit in one.edits if part)
        for drawn in sampler.drawings(here, prompts, seeds, settings, edits, report):
            yield _picture(drawn, now, common)


def _note_prompts(base: Base, asked: Request, report: Report) -> None:
    for prompt in dict.fromkeys(prompt for prompt, _ in asked.pairs):
        if not prompt.strip():
            report.note("the empty prompt asks for nothing in particular")
        elif not asked.erasures and " " not in prompt and _is_name(prompt):
            name = escape(prompt)
            report.warn(f"an erasure here is called {name!r}, too: draw with it by --with {name}")
        if left_out := base.cut(prompt):
            report.warn(f"only {base.max_tokens} tokens are read, without: {escape(left_out)}")
        for word in base.unknown_words(prompt):
            if any(map(str.isalpha, word)):
                report.warn(f"{base.id} never learned {escape(word)!r}{_nearest(base, word)}")


def _is_name(prompt: str) -> bool:
    return naming.existing(prompt).name.endswith(naming.SUFFIX)


def _nearest(base: Base, word: str) -> str:
    """What it may have been meant for, among the words that the base knows."""
    if near := doubts.nearest(word, base.vocabulary()):
        return f"; {near}"
    return f", and draws something else; {doubts.KNOWN}" if base.id == "demo" else ""


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
    array = drawn.picture.numpy()  # [h, w, 3]
    text = {**common, **own}
    text["parameters"] = _parameters(text, array.shape, records)
    return Picture(array, drawn.prompt, drawn.seed, records, text)


def _parameters(
    text: Mapping[str, str], shape: Sequence[int], records: Sequence[Mapping[str, Json]]
) -> str:
    """What stable-diffusion-webui writes as `parameters`, which most viewers of such pictures read."""
    settings = json.loads(text["settings"])
    negative = f"\nNegative prompt: {settings['negative']}" if settings["negative"] else ""
    facts = {
        "Steps": settings["steps"],
        "Sampler": CALLED[settings["scheduler"]],
        "CFG scale": f"{settings['guidance']:g}",
        "Seed": text["seed"],
        "Size": f"{shape[1]}x{shape[0]}",
        "Model": PurePath(text["base"]).name.replace(",", " "),
        "Version": text["software"].partition(",")[0],
    }
    used = ", ".join(f"{one['digest'][:12]}: {one['strength']:g}" for one in records)
    facts |= {"Erasures": f'"{used}"'} if used else {}
    return f"{text['prompt']}{negative}\n" + ", ".join(f"{key}: {facts[key]}" for key in facts)


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
