"""Erase concepts from a checkpoint; one small file comes out.

    conceptzap erase "Van Gogh" --anchor painting
    conceptzap erase --from concepts.toml --method uce -o all

The checkpoint stays as it is. At the end: whether it is gone, the scores, a before/after picture
beside the file, and the command that draws with it. --from takes a list: every concept gets a file in
the folder that is called like the output, and all of them one stack; the same command goes on after a kill,
and under `accelerate launch -m conceptzap` each process makes its share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from conceptzap import methods
from conceptzap.cli import _many
from conceptzap.cli import _options as options
from conceptzap.task import KINDS

DEFAULTS = {"base": "demo", "seed": 0, "device": "auto", "dtype": "auto", "sample_every": 0}
NAMES = {"anchor": "anchors", "set": "overrides"}


def _kinds(incomplete: str) -> list[str]:
    return [kind for kind in KINDS if kind.startswith(incomplete)]


def _trackers(incomplete: str) -> list[str]:
    from conceptzap.verbs import tracking

    return [name for name in tracking.PACKAGES if name.startswith(incomplete)]


def run(
    concepts: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONCEPT", show_default=False,
                       help="What goes, each in its own quotes; @file for one a line."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", parser=options.path, show_default=False,
                     help="TOML or CSV of name, anchor, keep, method, kind: a file each and their stack."),
    ] = None,
    anchor: Annotated[
        list[str] | None,
        typer.Option("--anchor", metavar="A",
                     help="The replacement: one for all, or one each.  [default: near, by the kind]"),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", metavar="K", autocompletion=_kinds,
                     help=f"{', '.join(KINDS)}: one for all, or one each.  [default: guessed, shown by -n]"),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="K", help="What must stay. Repeatable, or @file."),
    ] = None,
    method: Annotated[str | None, options.usually(options.METHOD, methods.DEFAULT)] = None,
    preset: options.Preset = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="key=value", help="A setting of the method. Repeatable."),
    ] = None,
    toml: Annotated[
        Path | None,
        typer.Option("--config", metavar="TOML", parser=options.path,
                     help="These options from a file; [set] as table."),
    ] = None,
    save_config: Annotated[
        Path | None,
        typer.Option("--save-config", metavar="TOML", parser=options.path,
                     help="Write what --config takes again."),
    ] = None,
    base: Annotated[str | None, options.usually(options.BASE, DEFAULTS["base"])] = None,
    prediction: options.Prediction = None,
    seed: Annotated[int | None, options.usually(options.SEED, DEFAULTS["seed"])] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", help="Optimisation steps.  [default: the method's]"),
    ] = None,
    device: Annotated[str | None, options.usually(options.DEVICE, DEFAULTS["device"])] = None,
    dtype: Annotated[str | None, options.usually(options.DTYPE, DEFAULTS["dtype"])] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", parser=options.path,
                     help="[default: <concept>.lprompt.safetensors]"),
    ] = None,
    force: options.Force = False,
    preview: Annotated[
        bool | None,
        typer.Option("--preview/--no-preview",
                     help="A before/after picture beside the file.  [default: yes; with --from no]"),
    ] = None,
    log_with: Annotated[
        list[str] | None,
        typer.Option("--log-with", metavar="T", autocompletion=_trackers,
                     help="jsonl, tensorboard, wandb or trackio: losses, to FILE.logs. Repeatable."),
    ] = None,
    sample_every: Annotated[
        int | None,
        typer.Option("--sample-every", metavar="N", show_default=False,
                     help="A sample every N steps, to FILE.logs/samples.")
    ] = None,
    harden: Annotated[
        str | None,
        typer.Option("--harden", metavar="B", autocompletion=options._hardening,
                     help="quick, full or none: a gate that looks at the picture; full: attacked first."
                     f"  [default: {methods.HARDENED} for one {methods.DEFAULT} on the demo, else none]"),
    ] = None,
    after: Annotated[
        list[Path] | None,
        typer.Option("--after", metavar="FILE", parser=options.path,
                     help="An erasure that is in force while this one is learned. Repeatable."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", show_default=False,
                                 help="At most N pictures of a concept in the closing figures; 0: none.")
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option("--patience", metavar="N", show_default=False,
                     help="End learning when N of 20 checks in a row bring nothing more.  [default: never]"),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", metavar="DIR", parser=options.path,
                     help="All of this run into DIR/<date>-<concept>: file, picture, config, log."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a stopped run was.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Show the plan, do nothing.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    from conceptzap import api
    from conceptzap.errors import ThresholdError
    from conceptzap.format import atomic
    from conceptzap.format.naming import run_folder
    from conceptzap.registry import config
    from conceptzap.report import Report
    from conceptzap.terminal import show
    from conceptzap.terminal.progress import Progress
    from conceptzap.verbs import planning

    given = {
        "concepts": options.words(concepts), "anchor": options.words(anchor),
        "kind": options.words(kind), "keep": options.words(keep), "method": method,
        "after": [str(path) for path in after or ()],
        "preset": preset, "set": config.parse_sets(set_ or ()), "base": base, "seed": seed,
        "prediction": prediction, "steps": steps, "device": device, "dtype": dtype,
        "harden": harden, "patience": patience, "limit": limit, "preview": preview,
        "log_with": log_with, "sample_every": sample_every, "output": output, "run_dir": run_dir,
    }  # fmt: skip
    request = options.layered(toml, given, DEFAULTS)
    request = {NAMES.get(key, key): value or () if key in options.LISTS else value
               for key, value in request.items()}  # fmt: skip
    words = request.pop("concepts")
    run_dir = request.pop("run_dir")
    request["force"] = force
    if source:
        _many.check(concepts=words, save_config=save_config, run_dir=run_dir)
        return _many.run(source, {**request, "preview": bool(request["preview"])}, dry_run, as_json)
    request |= {"preview": request["preview"] is not False, "run_dir": run_dir and run_folder(run_dir, words)}
    report = Progress()
    # a plan is shown where a file is in its way, too
    asked = {**request, "force": force or dry_run}
    plan = api.plan(words, report=report if dry_run else Report(), **asked)
    saved = b""
    if save_config:
        atomic.check_writable(save_config, force)
        saved = config.to_toml(planning.resolve(words, **asked).config())
    if dry_run:
        if Path(plan["output"]).exists() and not force:
            report.warn(f"{show.shown(plan['output'])} exists: only with --force it would be replaced")
        if save_config:
            atomic.write_atomic(save_config, saved, force)
        show.emit("plan", plan) if as_json else show.plan(plan)
        return
    show.settled(plan)
    failed = None
    try:
        made = api.erase(words, **request, resume=resume, report=report)
    except ThresholdError as error:
        made, failed = error.made, error
    if save_config:
        atomic.write_atomic(save_config, saved, force)
    if not as_json:
        show.erased(made, plan["concepts"][0], request["base"])
    elif not failed:
        show.emit("erase", show.erased_record(made))
    if failed:
        raise failed
