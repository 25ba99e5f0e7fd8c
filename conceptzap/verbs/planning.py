"""A request to `erase`, resolved: every setting has its value, every target can be written.

Everything that can be known to be wrong before a base is loaded is found here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conceptzap import format, methods
from conceptzap.edit import Json
from conceptzap.errors import UsageError, escape
from conceptzap.format import atomic, naming
from conceptzap.registry import catalog, config, family
from conceptzap.result import check_seed
from conceptzap.task import Task
from conceptzap.training import wordings
from conceptzap.verbs import doubts, tracking

BUDGETS, PLAIN = ("quick", "full"), "none"  # of `--harden`, and for none of them
# settings that count something there has to be at least one of, in whatever method has them
COUNTS = (
    "steps", "batch", "trajectories", "size", "tokens", "directions",
    "features", "expansion", "k", "pictures", "dictionary_steps", "dictionary_rows",
)  # fmt: skip
# the built-in checkpoint, and what its tokenizer's words look like (`base.bpe` needs transformers)
DEMO_FOLDER = config.PACKAGE / "demo" / "checkpoint"
SMALL_VOCABULARY, WORD_END = 5000, "</w>"
# names of `resolve` -> options of the command line, where they differ
OPTIONS = {"anchors": "anchor", "overrides": "set"}
# what a `--config` file takes from the request as it was made; the rest is settled by the plan
AS_GIVEN = ("anchors", "kind", "keep", "preset", "after")
COUNTED = {"sample-every": 0, "limit": 0, "patience": 1}  # options that count something: the least of each
SETTLED = (
    "method", "base", "prediction", "seed", "device", "dtype", "harden", "patience", "limit", "preview",
)  # fmt: skip


@dataclass(frozen=True)
class ErasePlan:
    """What `erase` was asked for, with nothing left to default but what depends on the base.

    `settings` has the fields of the method's Config. `fill_keep`: no keep set was given, so that
    the kind's word list stands in. `preview`: a picture is drawn and written beside the file.
    `harden`: the budget with which it gets a gate that looks at the picture, None for none.
    `after`: digest -> path of erasures that are in force while this one is learned, by digest.
    `limit`: at most so many pictures of a concept are judged at the end, None for the usual number.
    `log_with`: trackers that hear of the training, `sample_every` so many steps a sample is drawn.
    `patience`: learning ends when so many checks in a row bring nothing more, None for never. `run`: the
    folder that all of it goes into, None for beside the erasure. `request`: the arguments that were given.
    """

    task: Task
    fill_keep: bool
    method: str
    settings: Any
    base: str
    prediction: str | None
    seed: int
    device: str
    dtype: str
    output: Path
    force: bool
    preview: bool
    request: Mapping[str, Any]
    log_with: tuple[str, ...] = ()
    sample_every: int = 0
    harden: str | None = None
    after: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    limit: int | None = None
    patience: int | None = None
    run: Path | None = None

    @property
    def given_anchors(self) -> tuple[str | None, ...]:
        """The anchors that somebody asked for; a usual one may be unknown to the base."""
        return self.task.anchors if self.request.get("anchors") else ()

    @property
    def targets(self) -> tuple[Path, ...]:
        """All that may be written: the erasure, its key and, where one is drawn, the picture."""
        picture = (naming.preview_path(self.output),) if self.preview else ()
        return (self.output, naming.key_path(self.output), *picture)

    @property
    def logs(self) -> Path:
        """The folder for what trackers and samples leave: the run's, or one beside the erasure."""
        return self.run or self.output.with_name(naming.bare(self.output.name) + ".logs")

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, there while there are any."""
        if self.run:
            return self.run / "checkpoints"
        return self.output.with_name(f".{naming.bare(self.output.name)}.training")

    def record(self) -> dict[str, Json]:
        """The plan as `--dry-run` shows it."""
        return {
            "concepts": list(self.task.concepts),
            "anchors": list(self.task.anchors),  # None: the nearest thing that the base knows
            "keep": list(self.task.keep),
            "kinds": list(self.task.kinds),
            "method": self.method,
            "config": dataclasses.asdict(self.settings),
            "base": self.base,
            "prediction": self.prediction,
            "seed": self.seed,
            "device": self.device,
            "dtype": self.dtype,
            "preview": self.preview,
            "limit": self.limit,
            "harden": self.harden,
            "after": list(self.after),
            "patience": self.patience,
            "output": str(self.output.absolute()),
        }

    def config(self) -> dict[str, Any]:
        """The plan as a `--config` file: with it alone, the same concepts give the same bytes."""
        asked = ((OPTIONS.get(name, name), self.request.get(name)) for name in AS_GIVEN)
        given = {name: value if isinstance(value, str) else list(_listed(value)) for name, value in asked}
        settled = {name: getattr(self, name) for name in SETTLED} | {"harden": self.harden or PLAIN}
        table = {
            "concepts": list(self.task.concepts), **settled, **given,
            "set": dataclasses.asdict(self.settings),
        }  # fmt: skip
        return {key: value for key, value in table.items() if value is not None and value not in ([], ())}

    def resume_command(self) -> str:
        """The command line that takes a stopped run up."""
        return self.command("--resume")

    def command(self, *more: str) -> str:
        """The command line of the request as it was made, with `more` options."""
        words = ["conceptzap", "erase"]
        for name, value in self.request.items():
            option = f"--{OPTIONS.get(name, name).replace('_', '-')}"
            if name == "overrides":
                words += [word for k, v in (value or {}).items() for word in (option, f"{k}={v}")]
            elif value is True:
                words.append(option)
            elif value is False:
                words.append(f"--no-{name}")
            elif name in ("anchors", "keep", "kind", "log_with", "after"):
                words += [word for item in _listed(value) for word in (option, _literal(item))]
            elif value is not None:
                words += [option, str(value)]
        concepts = [_literal(concept) for concept in self.task.concepts]
        dashed = ["--"] if any(concept.startswith("-") for concept in concepts) else []
        return shlex.join([*words, *more, *dashed, *concepts])


def _literal(text: str) -> str:
    """A list option's value, kept from being read as the name of a file."""
    return f"@{text}" if text.startswith("@") else text


def _listed(value: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None) -> tuple[str, ...]:
    return (os.fspath(value),) if isinstance(value, str | os.PathLike) else tuple(map(str, value or ()))


def resolve(
    concepts: Sequence[str] | str,
    *,
    anchors: Sequence[str] | str = (),
    keep: Sequence[str] | str = (),
    kind: Sequence[str] | str = (),
    method: str | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    base: str | os.PathLike[str] = "demo",
    prediction: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    output: Path | str | None = None,
    force: bool = False,
    preview: bool = True,
    log_with: Sequence[str] | str = (),
    sample_every: int = 0,
    harden: str | None = None,
    after: Sequence[Path | str] | Path | str = (),
    limit: int | None = None,
    patience: int | None = None,
    run_dir: Path | str | None = None,
) -> ErasePlan:
    """The plan of a request; raises `UsageError` for one that cannot be meant.

    That includes words that a base on this disk does not know, as far as that can be told without
    loading it. Also raises `ResourceError` where one of the targets could not be written.
    """
    usual, base = resolve.__kwdefaults__, os.fspath(base)
    request = {name: value for name, value in locals().items() if value != usual.get(name, value)}
    chosen = config.preset(preset) if preset else {}
    method = method or chosen.get("method", methods.DEFAULT)
    unless_told = chosen.get("harden") or _usual_budget(method, base)
    harden = harden or unless_told
    if harden == unless_told:
        request.pop("harden", None)
    _check(method, seed, harden, sample_every, limit, patience)
    task = _task(concepts, anchors, keep, kind, chosen)
    run = None
    if run_dir is not None:
        if output is not None:
            raise UsageError("--run-dir and --output are both given", "leave one out; a run names its files")
        run = naming.run_folder(run_dir, task.concepts)
        request["run_dir"] = str(run)
        output, log_with = run / naming.erasure_path(task.concepts), ["jsonl", *_listed(log_with)]
    plan = ErasePlan(
        task=task, fill_keep=not keep and not chosen.keys() & {"keep", "names"}, method=method,
        settings=_settings(method, chosen, overrides or {}, steps), base=base,
        prediction=prediction, seed=seed, device=device, dtype=dtype,
        output=naming.erasure_path(task.concepts, output), force=force, preview=preview,
        request=request, log_with=tracking.check(_listed(log_with)), sample_every=sample_every,
        harden=None if harden == PLAIN else harden, after=_installed(_listed(after), method), limit=limit,
        patience=patience, run=run,
    )  # fmt: skip
    _check_words(plan)
    for path in plan.targets if run is None or run.exists() else (_to_be_made(run),):
        atomic.check_writable(path, force)
    return plan


def _installed(paths: Sequence[str], method: str) -> dict[str, Path]:
    """Digest -> path of the erasures that the new one is learned beside, whatever their order."""
    if paths and catalog.method(method)["cost"] == catalog.CLOSED:
        message = f"{method} never runs the model, so it learns nothing from erasures that are --after"
        raise UsageError(message, "leave --after out, or choose a method that trains or samples")
    found = {format.read_header(path).digest: naming.existing(path) for path in paths}
    return dict(sorted(found.items()))


def _to_be_made(folder: Path) -> Path:
    """What has to be made first, so that there is this folder: itself, or the first missing above it."""
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    return missing[-1]


def budget_of_many(preset: str | None) -> str:
    """What a list of concepts or a bench is hardened with where nobody says: nothing, but for a preset."""
    return (config.preset(preset) if preset else {}).get("harden", PLAIN)


def _usual_budget(method: str, base: str) -> str:
    """What `erase` hardens with where nobody says: only the default, and only where it was measured."""
    return methods.HARDENED if method == methods.DEFAULT and _built_in(base) else PLAIN


def _built_in(base: str) -> bool:
    return base == "demo" or Path(base).resolve() == DEMO_FOLDER.resolve()


def _check(method: str, seed: int, harden: str, *counts: int | None) -> None:
    """`counts` as in `COUNTED`."""
    family.require("methods", method)
    check_seed(seed)
    if harden not in (PLAIN, *BUDGETS):
        raise UsageError(f"--harden {escape(harden)} is unknown", f"use {', '.join(BUDGETS)} or {PLAIN}")
    for (name, least), value in zip(COUNTED.items(), counts, strict=True):
        if value is not None and value < least:
            raise UsageError(f"--{name} {value} is out of range", f"use {least or '0 for none, 1'} or more")


def _task(
    concepts: Sequence[str] | str,
    anchors: Sequence[str] | str,
    keep: Sequence[str] | str,
    kind: Sequence[str] | str,
    preset: Mapping[str, Any],
) -> Task:
    """The task as given, what was left out from the preset, and the rest guessed from the words."""
    given = Task(
        _listed(concepts),
        _listed(anchors) or _listed(preset.get("anchor")) or (None,),
        _listed(keep) or config.kept_words(preset),
        _listed(kind) or _listed(preset.get("kind")),
    )
    kinds = tuple(one or wordings.guess_kind(concept, anchor) for concept, anchor, one in given.triples)
    usual = map(wordings.usual_anchor, given.concepts, kinds)
    become = [u if a is None else a for a, u in zip(given.anchors, usual, strict=True)]
    return dataclasses.replace(given, anchors=tuple(become), kinds=kinds)


def _check_words(plan: ErasePlan) -> None:
    """Raise `UsageError` for a concept or anchor with a word that the base does not know."""
    words = _own_words(plan.base)
    for name in (*plan.task.concepts, *filter(None, plan.given_anchors)) if words else ():
        for word in re.findall(r"\w+|[^\w\s]+", name.lower()):
            if word not in words:
                raise UsageError(
                    f"{plan.base} does not know {escape(name)!r} (it never learned {escape(word)!r})",
                    doubts.instead(name, word, (w for w, whole in words.items() if whole), plan.base),
                )


def _own_words(base: str) -> dict[str, bool]:
    """The words of a base with a small vocabulary, made for its captions; none for any other.

    The value says whether it is a word for people too, not the end of a longer one ("rch"). The
    built-in checkpoint's captions are known, folders are looked into, without torch; ids are left alone.
    """
    if _built_in(base):
        return {word: len(word) > 2 for word in config.demo_words()}
    folder = Path(base) / "tokenizer"
    try:
        tokens = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    if not isinstance(tokens, dict) or len(tokens) >= SMALL_VOCABULARY:
        return {}
    ends = {merge.rpartition(" ")[2] for merge in merges}
    whole = (token for token in tokens if token.endswith(WORD_END))
    return {t.removesuffix(WORD_END): len(t) > 6 and t not in ends for t in whole}


def _settings(
    method: str, preset: Mapping[str, Any], overrides: Mapping[str, Any], steps: int | None
) -> Any:
    cls = catalog.settings(method)
    layers = [preset.get("methods", {}).get(method, {}), overrides]
    if steps is not None:
        _check_count("steps", steps)
        if "steps" not in {field.name for field in dataclasses.fields(cls)}:
            raise UsageError(f"{method} has no optimisation steps", "leave --steps out")
        layers.append({"steps": steps})
    resolved = config.resolve(cls, *layers)
    for name, value in dataclasses.asdict(resolved).items():
        if isinstance(value, int):
            _check_count(name, value)
    return resolved


def _check_count(name: str, value: int) -> None:
    least = 1 if name in COUNTS else 0
    if value < least:
        option = f"--{name}" if name == "steps" else name
        raise UsageError(f"{option} {value} is out of range", f"use {least} or more")
