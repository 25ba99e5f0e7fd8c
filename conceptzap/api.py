"""The verbs: erase, load, save, stack, generate, apply, inspect. No logic of their own."""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conceptzap import config, edit, family, files, format, naming
from conceptzap.edit import Edit, Erasure, Header, Json
from conceptzap.errors import MismatchError, ThresholdError, UsageError
from conceptzap.format import Info
from conceptzap.report import Report
from conceptzap.result import Score, Settings, check_seed
from conceptzap.task import Task

if TYPE_CHECKING:
    import numpy as np
    from diffusers import DiffusionPipeline

    from conceptzap.attach import Attachment, Receipt
    from conceptzap.base import Base
    from conceptzap.session import Session

DEFAULT_METHOD = "zap"
PREVIEW_SEEDS = 4
NOT_ERASED = 0.2  # a closing leak above this is no erasure
Source = Path | str | Erasure

inspect = format.read_header
load = format.load


def save(erasure: Erasure, path: Path | str, force: bool = False) -> str:
    """Write an erasure; its digest. See `format.save`."""
    return format.save(erasure, path, force)


def stack(items: Iterable[Source]) -> Erasure:
    """One erasure from several, whatever their order; paths are read. See `edit.stack`."""
    return edit.stack([_erasure(item) for item in items])


def _erasure(item: Source) -> Erasure:
    return item if isinstance(item, Erasure) else format.load(item)


# erase


@dataclass(frozen=True)
class ErasedFile:
    """What `erase` made: the file (and its key's, its picture's), the scores and the value itself."""

    path: Path
    bytes: int
    digest: str
    method: str
    seconds: float
    scores: Mapping[str, Score]
    preview: Path
    key: Path | None
    erasure: Erasure


@dataclass(frozen=True)
class Plan:
    """A request to `erase`, resolved: nothing is left to default."""

    task: Task
    method: str
    settings: Any  # the method's Config
    base: str
    prediction: str | None
    seed: int
    device: str
    dtype: str
    output: Path

    def record(self) -> dict[str, Json]:
        return {
            "concepts": list(self.task.concepts),
            "anchors": list(self.task.anchors),
            "keep": list(self.task.keep),
            "kind": self.task.kind,
            "method": self.method,
            "config": dataclasses.asdict(self.settings),
            "base": self.base,
            "seed": self.seed,
            "device": self.device,
            "dtype": self.dtype,
            "output": str(self.output.absolute()),
        }


def plan(concepts: Sequence[str] | str, **request: Any) -> dict[str, Json]:
    """What `erase` with the same arguments would do, without doing it."""
    request = {key: value for key, value in request.items() if key not in ("resume", "report")}
    return _plan(concepts, **request).record()


def _plan(
    concepts: Sequence[str] | str,
    *,
    anchors: Sequence[str] | str = (),
    keep: Sequence[str] = (),
    method: str | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    base: str = "demo",
    prediction: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    output: Path | str | None = None,
    force: bool = False,
) -> Plan:
    concepts, anchors, keep = (_listed(value or ()) for value in (concepts, anchors, keep))
    method = method or DEFAULT_METHOD
    family.require("methods", method)
    chosen = config.preset(preset) if preset else {}
    task = Task(concepts, anchors or _listed(chosen.get("anchor", ())), keep, chosen.get("kind", ""))
    target = naming.erasure_path(task.concepts, output)
    for path in (target, naming.preview_path(target), naming.key_path(target)):
        files.check_writable(path, force)
    return Plan(
        task=task,
        method=method,
        settings=_settings(method, chosen, overrides or {}, steps),
        base=base,
        prediction=prediction,
        seed=check_seed(seed),
        device=device,
        dtype=dtype,
        output=target,
    )


def _listed(value: Sequence[str] | str) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _settings(method: str, preset: Mapping[str, Any], overrides: Mapping[str, Any], steps: int | None) -> Any:
    cls = family.load("methods", method).Config
    layers = [preset.get("methods", {}).get(method, {}), overrides]
    if steps is not None:
        if "steps" not in {field.name for field in dataclasses.fields(cls)}:
            raise UsageError(f"{method} has no optimisation steps", "leave --steps out")
        layers.append({"steps": steps})
    resolved = config.resolve(cls, *layers)
    if getattr(resolved, "steps", 1) < 1:
        raise UsageError(f"--steps {resolved.steps} is out of range", "use 1 or more")
    return resolved


def erase(
    concepts: Sequence[str] | str, *, resume: bool = False, report: Report | None = None, **request: Any
) -> ErasedFile:
    """Take concepts out of a base and write the erasure, its key if it has one, and a picture.

    Keyword arguments: `anchors`, `keep`, `method`, `preset`, `overrides` (settings of the method),
    `base`, `prediction`, `seed`, `steps`, `device`, `dtype`, `output`, `force`. With `resume` a
    stopped training is taken up. Raises `ThresholdError` when the closing figures still see the
    concept; the file is kept.
    """
    planned = _plan(concepts, **request)
    force = bool(request.get("force"))
    listener = report or Report()
    began = time.monotonic()
    base = _load_base(planned)
    task = _task(base, planned.task)
    work = _Work(planned, listener, resume)
    edits = _edits(planned, base, task, work)
    scores = _close(base, edits, task, planned, listener)
    erased, key = (_assemble(base, planned, task, edits, role, scores) for role in ("erase", "key"))
    format.save(erased, planned.output, force)
    key_path = None
    if key:
        key_path = naming.key_path(planned.output)
        format.save(key, key_path, force)
    preview = _preview(base, planned, task, force)
    work.clear()
    made = ErasedFile(
        path=planned.output,
        bytes=planned.output.stat().st_size,
        digest=format.read_header(planned.output).digest,
        method=planned.method,
        seconds=time.monotonic() - began,
        scores=scores,
        preview=preview,
        key=key_path,
        erasure=format.load(planned.output),
    )
    _check_erased(made)
    return made


def _check_erased(made: ErasedFile) -> None:
    leak = made.scores.get("leak")
    if leak and leak.value > NOT_ERASED:
        error = ThresholdError(
            f"not erased: {leak.value:.0%} of {leak.n} pictures still show it (kept: {made.path})",
            "try more --steps, another --anchor or another --method",
        )
        error.made = made
        raise error


def _load_base(planned: Plan) -> Base:
    from conceptzap.base import load_base

    return load_base(planned.base, planned.device, planned.dtype, planned.prediction)


def _task(base: Base, task: Task) -> Task:
    """The task with the default keep set; raises `UsageError` for words the base cannot know."""
    for concept in task.concepts:
        _check_concept(base, concept)
    if task.keep:
        return task
    from conceptzap import prompts

    kind = task.kind or prompts.guess_kind(*task.pairs[0])
    words = config.preset(kind).get("keep", ()) if kind in config.preset_names() else ()
    return replace(task, keep=tuple(word for word in words if not base.unknown_words(word)), kind=kind)


def _check_concept(base: Base, concept: str) -> None:
    if unknown := base.unknown_words(concept):
        raise UsageError(
            f"{base.id} does not know {concept!r} (no token for {unknown[0]!r})",
            family.suggest(concept, base.vocabulary()),
        )
    length = base.token_count(concept)
    if length > base.max_tokens // 4:
        raise UsageError(f"concept {concept[:40]!r} is {length} tokens long", "name it in a few words")


class _Work(Report):
    """What a method is given: the caller's report, the seed, and a session for each training."""

    def __init__(self, planned: Plan, listener: Report, resume: bool) -> None:
        super().__init__(planned.seed)
        self.planned, self.listener, self.resume = planned, listener, resume
        self.note, self.progress = listener.note, listener.progress
        stem = planned.output.name.removesuffix(naming.SUFFIX)
        self.folder = planned.output.with_name(f".{stem}.training")
        self.sessions: list[Session] = []

    def session(self, settings: Mapping[str, object]) -> Session:
        from conceptzap.session import Session

        identity = {**self.planned.record(), "output": "", "trained": dict(settings)}
        folder = self.folder / str(len(self.sessions) + 1)
        warn = getattr(self.listener, "warn", self.listener.note)
        session = Session(folder, identity, _command(self.planned), warn=warn)
        if not self.resume:
            session.clear()
        elif session.resume:
            self.note(f"taking up the training at step {session.resume}")
        self.sessions.append(session)
        return session

    def clear(self) -> None:
        for session in self.sessions:
            session.clear()
        if self.folder.is_dir():
            self.folder.rmdir()


def _command(planned: Plan) -> str:
    """The command line that takes a stopped run up."""
    words = ["conceptzap", "erase", *planned.task.concepts]
    words += [word for anchor in planned.task.anchors if anchor for word in ("--anchor", anchor)]
    words += [word for keep in planned.task.keep for word in ("--keep", keep)]
    words += ["--method", planned.method, "--base", planned.base, "--seed", str(planned.seed)]
    for key, value in dataclasses.asdict(planned.settings).items():
        words += ["--set", f"{key}={value}"]
    return shlex.join([*words, "--device", planned.device, "-o", str(planned.output), "--resume"])


def _edits(planned: Plan, base: Base, task: Task, work: Report) -> list[Edit]:
    """The method's edits as a file gives them back: fp16 tensors, fp32 gates, all on the CPU."""
    member = family.load("methods", planned.method)
    return [_plain(edit) for edit in member.erase(base, task, planned.settings, work)]


def _plain(one: Edit) -> Edit:
    import torch

    tensors = {slot: t.detach().to("cpu", torch.float16) for slot, t in one.tensors.items()}
    return replace(one, tensors=tensors)


def _close(
    base: Base, edits: Sequence[Edit], task: Task, planned: Plan, listener: Report
) -> dict[str, Score]:
    from conceptzap import evaluation

    listener.note("measuring what is erased and what is kept")
    erasing = [one for one in edits if one.role == "erase"]
    settings = replace(_drawing(base), batch=16)
    return evaluation.closing(base, erasing, task, settings, planned.seed)


def _assemble(
    base: Base, planned: Plan, task: Task, edits: Sequence[Edit], role: str, scores: Mapping[str, Score]
) -> Erasure | None:
    from conceptzap import canary

    mine = edit.sort_edits(one for one in edits if one.role == role)
    if not mine:
        return None
    sites = [site for one in mine for site in one.sites]
    kept = {name: _score_record(score, planned.seed) for name, score in scores.items()}
    header = Header(
        title=", ".join(task.concepts) + ("" if role == "erase" else f" ({role})"),
        concepts=task.concepts,
        anchors=task.anchors,
        base=base.reference(sites),
        made=(_provenance(planned, task),),
        scores=kept if role == "erase" else {},
        canary=_canaries(canary, base, mine, task),
    )
    return Erasure(header, mine)


def _canaries(canary: Any, base: Base, edits: Sequence[Edit], task: Task) -> dict[str, Json]:
    """One self-test for each set of gates: edits behind different gates open for different concepts."""
    groups: dict[tuple[str, ...], list[Edit]] = {}
    for one in edits:
        groups.setdefault(tuple(sorted(gate.name for gate in one.gates)), []).append(one)
    result: dict[str, Json] = {}
    for members in groups.values():
        prompt = next((c for c in task.concepts if _opens(base, members, c)), task.concepts[0])
        result |= canary.make(base, members, prompt)
    return result


def _opens(base: Base, edits: Sequence[Edit], prompt: str) -> bool:
    import torch

    from conceptzap.gates import Signal, factor

    signal = Signal(base.encode([prompt]).states, torch.tensor([500.0], device=base.device))
    return all(bool(factor(one, signal).any()) for one in edits)


def _score_record(score: Score, seed: int) -> dict[str, Json]:
    return {**score.record(), "better": score.better, "seeds": [seed]}


def _provenance(planned: Plan, task: Task) -> dict[str, Json]:
    from importlib.metadata import version

    import conceptzap

    versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return {
        "method": planned.method,
        "config": dataclasses.asdict(planned.settings),
        "keep": list(task.keep),
        "seed": planned.seed,
        "versions": {"conceptzap": conceptzap.__version__, **versions},
    }


def _preview(base: Base, planned: Plan, task: Task, force: bool) -> Path:
    """The same-seed picture: what was written is loaded, attached, and drawn with."""
    from conceptzap import lessons, pictures, sampler

    erasure = format.load(planned.output)
    _check_fit(base, erasure, strict=True)
    told = next(lessons.lessons(base, task))
    asked = [pair.concept for pair in told.pairs][-PREVIEW_SEEDS:] or list(task.concepts)
    kept = [prompt for prompt in told.keep if prompt][-PREVIEW_SEEDS:]
    settings = _drawing(base)
    rows = []
    for label, wanted in (("concept", asked), ("kept", kept)):
        seeds = list(range(planned.seed, planned.seed + len(wanted)))
        for when, edits in (("before", ()), ("after", erasure.edits)):
            drawn = sampler.draw(base, wanted, seeds, settings, edits)
            rows.append((f"{label} {when}", list(drawn.numpy())))
    path = naming.preview_path(planned.output)
    scale = max(1, 128 // base.size)
    text = {"concepts": ", ".join(task.concepts), "digest": erasure.digest}
    pictures.save_png(path, pictures.side_by_side(rows, scale), text, force)
    return path


# generate


@dataclass(frozen=True)
class Picture:
    """One drawn picture, uint8 [h, w, 3], with what every PNG of it says in `text`."""

    array: np.ndarray
    prompt: str
    seed: int
    erasures: tuple[Mapping[str, Json], ...]
    text: Mapping[str, str]


@dataclass(frozen=True)
class Loaded:
    """An erasure as it was asked for: from where, and how strong."""

    erasure: Erasure
    path: Path | None
    strength: float

    @property
    def edits(self) -> tuple[Edit, ...]:
        return self.erasure.scaled(self.strength).edits


def generate(
    prompts: Sequence[str] | str,
    *,
    erasures: Iterable[Any] = (),
    base: str | Base = "demo",
    prediction: str | None = None,
    seed: int = 0,
    count: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str = "",
    batch: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    policy: Path | str | None = None,
    strict: bool = False,
    report: Report | None = None,
) -> Iterator[Picture]:
    """Draw `count` pictures of every prompt, picture k with seed `seed` + k, under the erasures.

    `erasures` are paths or values, or pairs of one and its strength. Requests and files are checked
    at the call, the base when the first picture is asked for. Raises `SilentEditError` rather than
    giving out a picture that an edit did not take part in.
    """
    prompts = _listed(prompts)
    if not prompts or count < 1:
        raise UsageError("no picture was asked for", 'for example: conceptzap generate "a cat"')
    check_seed(check_seed(seed) + count - 1)
    wanted = Settings(steps or 1 if steps is None else steps, 1.0 if guidance is None else guidance, negative, batch)
    loaded = [_loaded(item) for item in erasures]
    pinned = None
    if policy is not None:
        from conceptzap import policy as policies

        pinned = policies.read(Path(policy))
        policies.verify_files(pinned)
    given = {"steps": steps, "guidance": guidance}
    listener = report or Report()

    def pictures() -> Iterator[Picture]:
        from conceptzap.base import load_base

        here = load_base(base, device, dtype, prediction) if isinstance(base, str) else base
        settings = replace(
            _drawing(here), **{k: v for k, v in given.items() if v is not None},
            negative=wanted.negative, batch=wanted.batch,
        )
        active = _under_policy(pinned, here, loaded) if pinned else loaded
        notes = [_admit(here, one, strict, listener) for one in active]
        pairs = [(prompt, seed + k) for prompt in prompts for k in range(count)]
        yield from _pictures(here, pairs, settings, active, any(notes), pinned)

    return pictures()


def _drawing(base: Base) -> Settings:
    """The settings a base is drawn with when nobody says: the demo's own, or Stable Diffusion's."""
    return Settings() if base.id == "demo" else Settings(steps=30, guidance=7.5)


def _loaded(item: Any) -> Loaded:
    source, strength = item if isinstance(item, tuple) else (item, 1.0)
    if not 0 <= strength <= 2:
        raise UsageError(f"strength {strength} is out of range", "use 0 to 2")
    path = None if isinstance(source, Erasure) else Path(source)
    return Loaded(_erasure(source), path, float(strength))


def _under_policy(policy: Any, base: Base, given: Sequence[Loaded]) -> list[Loaded]:
    from conceptzap import policy as policies

    pinned = policies.enforce(policy, base)
    if given:
        policies.check_erasures(policy, [one.erasure.scaled(one.strength) for one in given])
    return [Loaded(erasure, None, 1.0) for erasure in pinned]


def _admit(base: Base, one: Loaded, strict: bool, report: Report) -> bool:
    """Check that an erasure fits and acts here; whether it was made on another checkpoint."""
    foreign = _check_fit(base, one.erasure, strict)
    if foreign:
        warn = getattr(report, "warn", report.note)
        warn(f"{one.erasure.header.title!r} was made and measured on another checkpoint than {base.id}")
    return foreign


def _check_fit(base: Base, erasure: Erasure, strict: bool) -> bool:
    """Whether the erasure is of another checkpoint; raises for another architecture or a dead edit."""
    from conceptzap import canary

    made_for = erasure.header.base
    if made_for.signature != base.signature:
        raise MismatchError(
            f"{erasure.header.title!r} was made for {made_for.id} ({made_for.family}),"
            f" {base.id} ({base.family}) has another architecture",
            "use the base it was made for, or make the erasure on this one",
        )
    here = base.fingerprint(site for one in erasure.edits for site in one.sites)
    foreign = any(here.get(part) != print_ for part, print_ in made_for.fingerprint.items())
    if foreign and strict:
        raise MismatchError(
            f"{erasure.header.title!r} was made on another checkpoint than {base.id}",
            "leave --strict out, or make the erasure on this one",
        )
    canary.check(base, erasure, exact=not foreign)
    return foreign


def _pictures(
    base: Base,
    pairs: Sequence[tuple[str, int]],
    settings: Settings,
    active: Sequence[Loaded],
    foreign: bool,
    policy: Any,
) -> Iterator[Picture]:
    from conceptzap import sampler

    edits = edit.sort_edits(one for loaded in active for one in loaded.edits)
    names = [{one.name for one in loaded.edits} for loaded in active]
    common = _facts(base, settings, foreign, policy)
    for drawn in sampler.drawings(base, *map(list, zip(*pairs, strict=True)), settings, edits):
        records = tuple(
            {
                "path": str(loaded.path) if loaded.path else None,
                "digest": loaded.erasure.digest,
                "strength": loaded.strength,
                "fired": bool(mine & drawn.fired),
            }
            for loaded, mine in zip(active, names, strict=True)
        )
        named = [{k: v for k, v in record.items() if k != "path"} for record in records]
        text = {**common, "prompt": drawn.prompt, "seed": str(drawn.seed), "erasures": json.dumps(named)}
        yield Picture(drawn.picture.numpy(), drawn.prompt, drawn.seed, records, text)


def _facts(base: Base, settings: Settings, foreign: bool, policy: Any) -> dict[str, str]:
    """What the PNGs of one run have in common."""
    import torch

    import conceptzap

    facts = {
        "software": f"conceptzap {conceptzap.__version__}, torch {torch.__version__}",
        "base": f"{base.id}@{base.revision}" if base.revision else base.id,
        "fingerprint": json.dumps(dict(base.fingerprint(()))),
        "settings": json.dumps(settings.record()),
        "device": f"{base.device.type} {base.dtype}, {torch.get_num_threads()} threads, {platform.machine()}",
    }
    if foreign:
        facts["warning"] = "an erasure was made and measured on another checkpoint"
    return facts | ({"policy": policy.digest} if policy else {})


# apply


class Handle:
    """Erasures attached to somebody's pipeline; `remove()` takes these off again, bit for bit.

    They stay for every pipeline over the same UNet and end with it: `save_pretrained` writes the
    plain base.
    """

    def __init__(self, pipeline: DiffusionPipeline, edits: Sequence[Edit]) -> None:
        self._unet = pipeline.unet
        self._edits = tuple(edits)
        shared = _APPLIED.setdefault(self._unet, _Applied())
        self._shared = shared
        shared.change(self._unet, [*shared.handles, self])

    def remove(self) -> None:
        """Take these erasures off; those of other `apply` calls stay. Twice does no harm."""
        self._shared.change(self._unet, [one for one in self._shared.handles if one is not self])

    @property
    def receipt(self) -> Receipt | None:
        """Rows and calls since the last `apply` or `remove` on this UNet; None when nothing is on."""
        return self._shared.attachment.receipt if self._shared.attachment else None


class _Applied:
    """All handles of one UNet behind one set of hooks."""

    def __init__(self) -> None:
        self.handles: list[Handle] = []
        self.attachment: Attachment | None = None

    def suspend(self) -> None:
        if self.attachment:
            self.attachment.remove()
        self.attachment = None

    def change(self, unet: Any, handles: list[Handle]) -> None:
        from conceptzap.attach import Attachment

        edits = edit.sort_edits(one for handle in handles for one in handle._edits)
        self.suspend()
        self.handles = handles
        if edits:
            self.attachment = Attachment(unet, edits)


_APPLIED: weakref.WeakKeyDictionary[Any, _Applied] = weakref.WeakKeyDictionary()


def apply(
    pipe: DiffusionPipeline, erasures: Source | Iterable[Source], strength: float = 1.0, strict: bool = False
) -> Handle:
    """Attach erasures to a diffusers pipeline; every call of it from now on is erased or raises.

    A second call stacks. Raises `FormatError`, `MismatchError` for another architecture and
    `RefusedError` if an edit does not act on this pipeline; nothing is attached then.
    """
    from conceptzap.base import from_pipeline

    items = [erasures] if isinstance(erasures, (str, Path, Erasure)) else list(erasures)
    loaded = [_loaded((item, strength)) for item in items]
    if not loaded:
        raise UsageError("no erasure was given to apply", "give a path or an Erasure")
    base = from_pipeline(pipe)
    shared = _APPLIED.get(pipe.unet)
    handles = list(shared.handles) if shared else []
    if shared:
        shared.suspend()
    try:
        for one in loaded:
            _admit(base, one, strict, _Warner())
    finally:
        if shared:
            shared.change(pipe.unet, handles)
    return Handle(pipe, [one for each in loaded for one in each.edits])


class _Warner(Report):
    """Notes as Python warnings, for those who call from Python."""

    def note(self, text: str) -> None:
        import warnings

        warnings.warn(text, stacklevel=4)
