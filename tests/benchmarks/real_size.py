"""Stable Diffusion 1.5 and SDXL at their full widths: what conceptzap costs beside the plain pipeline.

    python tests/benchmarks/real_size.py --work /tmp/real --output real_size.json

The architectures are the shipped configs with random weights, so nothing is downloaded and no figure
here speaks of quality. On a GPU everything runs in fp16 at the checkpoint's own size; on a CPU in fp32
with latents of 8 x 8 (an open file on wider ones, too), few training steps and no pictures, in seconds of
the CPU. Every stage is a process of its own, so that its peak memory is its own, and every time stands
beside the same thing without conceptzap, measured in the same process. A stage's figures are kept as soon
as it ends: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from checkpoints import build

import conceptzap
from conceptzap import format
from conceptzap.base import Base, Cond, load_base
from conceptzap.base.base import SIDES
from conceptzap.base.loading import quiet
from conceptzap.edit import Edit, Gate
from conceptzap.format import atomic
from conceptzap.registry import catalog
from conceptzap.report import Report
from conceptzap.result import Settings
from conceptzap.runtime import sampler
from conceptzap.runtime.attach import Attachment
from conceptzap.training import lessons, neighbours
from conceptzap.trust import admission
from conceptzap.verbs import work as working

FAMILIES = ("sd1", "sdxl")
COUNTS = (1, 10, 100, 1000)
NARROW = 8  # side of the latents on a CPU
WIDER = 4  # there an open file is asked on latents of a quarter of the family's own side, too
ROUNDS = 3
CALLS = 8  # UNet calls with one text that are timed together, on a GPU
METHODS = ("uce", "zap")
STAGES = ("build", "load", "inference", "unet_calls", "erase:uce", "erase:zap", "generate")
CASES = ("shut", "one open", "one open, wider", "new text")
TOKENS, RANK, DIRECTIONS = 8, 4, 4  # of the files that stand in for many
# what is less on a CPU, where a UNet call takes seconds and a text of SDXL two; a GPU has the defaults
CPU_SETTINGS = {"steps": 6, "trajectories": 4, "keep_prompts": 32}
CPU_WORDS = {neighbours: {"NOUNS": 500}, lessons: {"NEAREST": 8, "BESIDE": 8}}  # compared, and kept
CONCEPT, ANCHOR = "church", "house"


# -- measuring -----------------------------------------------------------------------------------


def now() -> float:
    """Seconds so far: of this process's CPU, which a busy machine leaves alone; with a GPU by the clock."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def clock(work: Callable[[], Any]) -> float:
    """Seconds of one run, the GPU's queue included."""
    gc.collect()  # what an earlier run left in cycles, a whole pipeline perhaps
    began = now()
    work()
    return now() - began


def peak() -> int:
    """Bytes at most in use in this process so far: the GPU's where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def dtype() -> str:
    return "float16" if torch.cuda.is_available() else "float32"


# -- stages --------------------------------------------------------------------------------------


def checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint, if it is not there yet; not in the parent, which would keep gigabytes of it."""
    if not (folder / "model_index.json").is_file():
        build(folder.name, folder, None if torch.cuda.is_available() else NARROW)
    return {}


def load(folder: Path) -> dict[str, Any]:
    """Loading by us and by diffusers, in turn."""
    from diffusers import DiffusionPipeline

    place = "cuda" if torch.cuda.is_available() else "cpu"

    def plain() -> None:
        with quiet():
            DiffusionPipeline.from_pretrained(str(folder), torch_dtype=getattr(torch, dtype())).to(place)

    plain()  # the disk's cache is warm from here on
    ours, theirs = clock(lambda: load_base(str(folder), dtype=dtype())), clock(plain)
    return {"load": round(ours / theirs, 3), "seconds": round(ours, 2)}


def inference(folder: Path) -> dict[str, Any]:
    """Peak memory and seconds of one plain picture."""
    base = load_base(str(folder), dtype=dtype())
    took = clock(lambda: sampler.draw(base, ["a cat"], [0], Settings(steps=4)))
    return {"peak": peak(), "seconds": round(took, 2)}


def unet_calls(folder: Path) -> dict[str, Any]:
    """Attaching many files, and a UNet call with all of them shut and with one open."""
    base = load_base(str(folder), dtype=dtype())
    files = [a_file(base, number, shut=True) for number in range(COUNTS[-1])]
    shut = {count: [edit for file in files[:count] for edit in file] for count in COUNTS}
    one = a_file(base, 0, shut=False)
    opened = {1: one, COUNTS[-1]: one + shut[COUNTS[-1]][2:]}
    found = {
        "shut": {count: call_ratio(base, edits) for count, edits in shut.items()},
        "one open": {count: call_ratio(base, edits) for count, edits in opened.items()},
    }
    if not torch.cuda.is_available():
        found["one open, wider"] = {1: call_ratio(base, one, wider(base))}
    return {
        "attach": {count: round(_attach_seconds(base, edits), 3) for count, edits in shut.items()},
        **{name: {count: pair[0] for count, pair in kind.items()} for name, kind in found.items()},
        "new text": {count: pair[1] for count, pair in found["shut"].items()},
    }


def wider(base: Base) -> int:
    """A side at which learned tokens weigh nearly as little as at the family's own: on `NARROW` latents a
    text is most of a call, and they lengthen it by a tenth."""
    return SIDES[base.family] // WIDER


def _attach_seconds(base: Base, edits: list[Edit]) -> float:
    def on_and_off() -> None:
        Attachment(base.unet, [replace(edit) for edit in edits]).remove()

    return min(clock(on_and_off) for _ in range(2))


@torch.no_grad()
def call_ratio(base: Base, edits: list[Edit], side: int = 0) -> tuple[float, float]:
    """UNet calls of two rows under the edits over the same calls without, in turn; `side` is that of the
    latents, 0 the checkpoint's.

    The first: calls with a text that was seen before, as all but the first of a picture are. The second:
    calls whose text is new, so that the gates are read.
    """
    size = (side * base.factor, side * base.factor) if side else None
    noise, calls = base.noise([0, 1], size), CALLS if torch.cuda.is_available() else 1

    def work(cond: Cond, times: int) -> None:
        for step in range(times):
            base.eps(noise, 900 - 100 * step, cond)

    def took(text: Cond, edited: bool) -> tuple[float, float]:
        """Seconds of the first call with a text, and of later ones; on a CPU one is as good without edits."""
        (attachment.restore if edited else attachment.remove)()
        fresh = replace(text, states=text.states.clone())
        first = clock(lambda: work(fresh, 1))
        return first, clock(lambda: work(fresh, calls)) if edited or calls > 1 else first

    text = base.encode(["", "a cat"])
    attachment = Attachment(base.unet, edits)
    took(text, True), took(text, False)
    pairs: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for turn in range(ROUNDS):
        for edited in (True, False) if turn % 2 else (False, True):
            pairs[edited].append(took(text, edited))
    attachment.remove()
    (new, known), (bare_new, bare) = (zip(*pairs[edited], strict=True) for edited in (True, False))
    return ratio(known, bare), ratio(new, bare_new)


def a_file(base: Base, number: int, shut: bool) -> list[Edit]:
    """The edits of one small file: learned tokens and a low-rank text edit behind a gate of its own."""
    width = base.unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(number)

    def random(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, generator=generator)).half()

    params = {"threshold": 1e4 if shut else -1e4}
    gate = Gate("match", params, {"query": random(DIRECTIONS, width), "mean": random(width)})
    prompt = {f"prompt_{letter}": random(TOKENS, width) for letter in "kv"}
    shift = {"into": random(width, RANK), "down": random(RANK, width)}
    return [
        Edit("tokens", base.sites("unet.*.attn2"), prompt, gates=(gate,)),
        Edit("weight", base.sites("unet.*.attn2.to_[kv]"), shift, gates=(gate,)),
    ]


def erase(folder: Path, method: str, output: Path) -> dict[str, Any]:
    """A whole `erase`, phase by phase, and how many UNet calls each phase makes; pictures on a GPU alone."""
    few: dict[str, int] = {}
    if not torch.cuda.is_available():
        known = {one["name"] for one in catalog.method(method)["settings"]}
        few = {name: value for name, value in CPU_SETTINGS.items() if name in known}
        for module, fewer in CPU_WORDS.items():
            vars(module).update(fewer)
    began, calls, phase = now(), Counter(), ["loading"]
    enter = working.Phases.enter

    def entered(self: working.Phases, name: str, about: str = "") -> None:
        phase[0] = name
        enter(self, name, about)

    working.Phases.enter, working.time = entered, SimpleNamespace(monotonic=now)
    base = load_base(str(folder), dtype=dtype())
    loaded = now() - began
    base.unet.conv_in.register_forward_pre_hook(lambda *_: calls.update(phase))
    encode, read = Base.encode, Counter[str]()

    def encoded(self: Base, prompts: Sequence[str], *rest: Any, **more: Any) -> Cond:
        read.update({phase[0]: len(prompts)})
        return encode(self, prompts, *rest, **more)

    Base.encode = encoded
    made = conceptzap.erase(
        CONCEPT, anchors=ANCHOR, method=method, base=base, output=output, force=True,
        preview=torch.cuda.is_available(), overrides=few,
    )  # fmt: skip
    return {
        "seconds": round(now() - began, 1),
        "phases": {name: round(value, 1) for name, value in ({**made.phases, "loading": loaded}).items()},
        "calls": dict(calls),
        "prompts": sum(read.values()),
        "peak": peak(),
        "bytes": made.bytes,
        "settings": few or "default",
        "digest": format.load(made.path).digest[:12],
    }


def generate(folder: Path, work: Path) -> dict[str, Any]:
    """What an erasure adds to loading a checkpoint: the file is read, admitted and tested on it.

    Plain `generate` reads the fingerprint, too: pictures say which weights drew them. One thread: what is this
    short would count the waiting of several.
    """
    torch.set_num_threads(1)
    bases: list[Base] = []

    def plain() -> None:
        bases.append(load_base(str(folder), dtype=dtype()))
        bases[0].fingerprint(())

    before, adds = clock(plain), {}
    for method in METHODS:
        took = []
        for _ in range(ROUNDS):
            fresh = replace(bases[0])  # a handle that has not looked at its weights
            fresh.fingerprint(())
            took.append(clock(lambda base=fresh, name=method: admitted(base, erased(folder, name, work))))
        adds[method] = round(statistics.median(took), 2)
    return {"loading": round(before, 2), "adds": adds}


def erased(folder: Path, method: str, work: Path) -> Path:
    return work / f"{folder.name}-{method}.lprompt.safetensors"


def admitted(base: Base, path: Path) -> None:
    loaded = admission.load_all([path])
    admission.admit_all(base, [one.erasure for one in loaded], True, Report())


# -- the table -----------------------------------------------------------------------------------


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, fp16, the checkpoint's own size"
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} threads, fp32, {NARROW} x {NARROW} latents"


def stages(families: Sequence[str], work: Path, kept: Path) -> dict[str, Any]:
    """All figures: each stage in a process of its own, so that peaks do not mix, and kept when it is done."""
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    for family in families:
        folder = work / family
        for stage in STAGES:
            if stage in found.get(family, {}) and found["machine"] == machine():
                continue
            command = [sys.executable, __file__, "--stage", stage, "--work", str(work)]
            command += ["--folder", str(folder)]
            began = time.monotonic()
            done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"{family} {stage} ended with exit code {done.returncode}")
            told = json.loads(done.stdout.splitlines()[-1]) | {"wall": round(time.monotonic() - began)}
            found.setdefault(family, {})[stage] = told
            found["machine"] = machine()
            atomic.write_atomic(kept, json.dumps(found, indent=1).encode() + b"\n", force=True)
            print(f"{family} {stage} {json.dumps(found[family][stage])}", file=sys.stderr, flush=True)
    return found


def run_stage(name: str, folder: Path, work: Path) -> dict[str, Any]:
    kind, _, method = name.partition(":")
    if kind == "erase":
        return erase(folder, method, erased(folder, method, work))
    if kind == "generate":
        return generate(folder, work)
    return {"build": checkpoint, "load": load, "inference": inference, "unet_calls": unet_calls}[kind](folder)


def table(found: dict[str, Any]) -> str:
    """One line a figure, of what is there."""
    rows = [f"machine: {found['machine']}"]
    for family in (name for name in found if name != "machine"):
        rows.append(f"{family}, {sum(one['wall'] for one in found[family].values())} s of the clock")
        for stage, one in found[family].items():
            kind, _, method = stage.partition(":")
            if kind == "load":
                rows.append(f"  load  x{one['load']} of diffusers ({one['seconds']} s)")
            elif kind == "unet_calls":
                rows += [f"  UNet call, {name}  {_counted(one[name])}" for name in CASES if name in one]
                rows.append("  attach  " + ", ".join(f"{n}: {value} s" for n, value in one["attach"].items()))
            elif kind == "generate":
                rows += [
                    f"  generate --with {method}  adds {added} s to loading, x{added / one['loading']:.3f}"
                    for method, added in one["adds"].items()
                ]
            elif kind == "erase":
                rows.append(_erased(method, one, found[family]["inference"]["peak"]))
    return "\n".join(rows)


def _counted(ratios: dict[str, float]) -> str:
    return ", ".join(f"{count}: x{value}" for count, value in ratios.items())


def _erased(method: str, one: dict[str, Any], plain: int) -> str:
    phases = ", ".join(
        f"{name} {value} s" + (f" and {one['calls'][name]} calls" if name in one["calls"] else "")
        for name, value in one["phases"].items()
    )
    return (
        f"  erase {method}  {one['seconds']} s ({phases}), {one['prompts']} prompts, {one['bytes']} bytes,"
        f" peak {one['peak'] / 2**30:.2f} GiB, {(one['peak'] - plain) / 2**30:+.2f} GiB to plain inference"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--work", type=Path, default=Path("build-real-size"))
    parser.add_argument("--output", type=Path, help="where the figures are kept as JSON (default: in --work)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(run_stage(args.stage, args.folder, args.work)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    print(table(stages(args.family, args.work, args.output or args.work / "real_size.json")))


if __name__ == "__main__":
    main()
