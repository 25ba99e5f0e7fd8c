"""Stable Diffusion 1.5 and SDXL at their full widths: what conceptzap costs beside the plain pipeline.

    python tests/benchmarks/real_size.py --work /tmp/real --output real_size.json

The architectures are the shipped configs with random weights, so nothing is downloaded and no figure
here speaks of quality. On a GPU everything runs in fp16 at the checkpoint's own size; on a CPU in fp32
with latents of 8 x 8. Every stage is a process of its own, so that its peak memory is its own, and every
time stands beside the same thing without conceptzap, measured in the same process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from conceptzap import format
from conceptzap.base import Base, load_base
from conceptzap.base.bpe import clip_tokenizer
from conceptzap.base.single_file import CONFIGS, PADS
from conceptzap.edit import Edit, Gate
from conceptzap.result import Settings
from conceptzap.runtime import sampler
from conceptzap.runtime.attach import Attachment, attached

FAMILIES = ("sd1", "sdxl")
COUNTS = (1, 10, 100, 1000)
NARROW = 8  # side of the latents on a CPU
ROUNDS = 5
CALLS = 8  # UNet calls with one text, of which the first reads the gates
TOKENS, RANK, DIRECTIONS = 8, 4, 4  # of the files that stand in for many
CPU_STEPS = 6  # of training there; a GPU trains as long as the method's default says
CONCEPT, ANCHOR = "Van Gogh", "painting"


# -- the checkpoints -----------------------------------------------------------------------------


def build(family: str, folder: Path, side: int | None) -> None:
    """Write a diffusers folder of the shipped configs, fp16, with random weights of unit gain."""
    import diffusers
    import transformers

    config, made = CONFIGS / family, {}
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if not (config / part).is_dir():
            continue
        settings = json.loads((config / part / "config.json").read_text())
        if part == "unet":
            settings |= {"sample_size": side or settings["sample_size"]}
        kind = {
            "unet": diffusers.UNet2DConditionModel,
            "vae": diffusers.AutoencoderKL,
            "text_encoder": transformers.CLIPTextModel,
            "text_encoder_2": transformers.CLIPTextModelWithProjection,
        }[part]
        made[part] = _random(kind, settings)
    for number, pad in enumerate(PADS[family], 1):
        made["tokenizer" if number == 1 else f"tokenizer_{number}"] = clip_tokenizer(pad)
    schedule = json.loads((config / "scheduler" / "scheduler_config.json").read_text())
    made["scheduler"] = diffusers.DDIMScheduler.from_config(schedule)
    if family == "sdxl":
        pipe = diffusers.StableDiffusionXLPipeline(**made, add_watermarker=False)
    else:
        off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionPipeline(**made, **off)
    pipe.save_pretrained(str(folder))


def _random(kind: Any, settings: dict[str, Any]) -> Any:
    """A module on empty weights first, for initialising them twice costs minutes."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        is_diffusers = hasattr(kind, "from_config")
        module = kind.from_config(settings) if is_diffusers else kind(kind.config_class(**settings))
    module = module.half().to_empty(device="cpu") if is_diffusers else _materialised(module.half())
    generator = torch.Generator().manual_seed(0)
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            gain = weight[0].numel() ** -0.5
            weight.data = torch.empty(weight.shape).normal_(0, gain, generator=generator).half()
        else:
            weight.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return module


def _materialised(module: Any) -> Any:
    """Empty parameters made real; buffers, which hold position ids, stay what they are."""
    for owner in module.modules():
        for name, weight in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, torch.nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype)))
    return module


# -- measuring -----------------------------------------------------------------------------------


def clock(work: Callable[[], Any]) -> float:
    """Seconds of one run, the GPU's queue included."""
    _wait()
    began = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak() -> int:
    """Bytes at most in use in this process so far: the GPU's where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ratio(ours: list[float], theirs: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def dtype() -> str:
    return "float16" if torch.cuda.is_available() else "float32"


# -- stages --------------------------------------------------------------------------------------


def load(folder: Path) -> dict[str, Any]:
    """Loading by us and by diffusers, in turn."""
    from diffusers import DiffusionPipeline

    place = "cuda" if torch.cuda.is_available() else "cpu"

    def plain() -> None:
        DiffusionPipeline.from_pretrained(str(folder), torch_dtype=getattr(torch, dtype())).to(place)

    plain()  # the disk's cache is warm from here on
    ours, theirs = [], []
    for _ in range(2):
        ours.append(clock(lambda: load_base(str(folder), dtype=dtype())))
        theirs.append(clock(plain))
    return {"load": ratio(ours, theirs), "seconds": round(statistics.median(ours), 2)}


def inference(folder: Path) -> dict[str, Any]:
    """Peak memory and seconds of one plain picture."""
    base = load_base(str(folder), dtype=dtype())
    took = clock(lambda: sampler.draw(base, ["a cat"], [0], Settings(steps=4)))
    return {"peak": peak(), "seconds": round(took, 2)}


def unet_calls(folder: Path) -> dict[str, Any]:
    """Attaching many files, and a UNet call with all of them shut and with one open."""
    base = load_base(str(folder), dtype=dtype())
    result: dict[str, Any] = {"attach": {}, "shut": {}}
    for count in COUNTS:
        edits = [edit for number in range(count) for edit in a_file(base, number, shut=True)]
        result["attach"][count] = round(_attach_seconds(base, edits), 3)
        result["shut"][count] = call_ratio(base, edits)
    edits[:2] = a_file(base, 0, shut=False)
    result["one open"] = {1: call_ratio(base, edits[:2]), COUNTS[-1]: call_ratio(base, edits)}
    return result


def _attach_seconds(base: Base, edits: list[Edit]) -> float:
    def on_and_off() -> None:
        Attachment(base.unet, edits).remove()

    return min(clock(on_and_off) for _ in range(2))


def call_ratio(base: Base, edits: list[Edit]) -> float:
    """UNet calls of two rows under the edits over the same calls without, in turn."""
    cond = base.encode(["", "a cat"])
    noise = base.noise([0, 1])

    @torch.no_grad()
    def calls() -> None:
        for t in range(900, 900 - 100 * CALLS, -100):
            base.eps(noise, t, cond)

    calls()
    ours, theirs = [], []
    for _ in range(ROUNDS):
        with attached(base.unet, edits):
            ours.append(clock(calls))
        theirs.append(clock(calls))
    return ratio(ours, theirs)


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
    """A whole `erase`, phase by phase, beside four steps of one plain picture in the same process."""
    import conceptzap
    from conceptzap.registry import catalog

    trains = any(one["name"] == "steps" for one in catalog.method(method)["settings"])
    few = {"steps": CPU_STEPS} if trains and not torch.cuda.is_available() else {}
    began = time.perf_counter()
    made = conceptzap.erase(
        CONCEPT, anchors=ANCHOR, method=method, base=str(folder), dtype=dtype(), output=output,
        force=True, **few,
    )  # fmt: skip
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "phases": {name: round(value, 1) for name, value in made.phases.items()},
        "peak": peak(),
        "bytes": made.bytes,
        "steps": few.get("steps", "default" if trains else 0),
        "digest": format.load(made.path).digest[:12],
    }


# -- the table -----------------------------------------------------------------------------------


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, fp16, the checkpoint's own size"
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} threads, fp32, {NARROW} x {NARROW} latents"


def stages(family: str, folder: Path, work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each stage in a process of its own, so that peaks do not mix."""
    for stage in ("load", "inference", "unet_calls", "erase:uce", "erase:zap"):
        command = [sys.executable, __file__, "--stage", stage, "--work", str(work), "--family", family]
        done = subprocess.run([*command, "--folder", str(folder)], stdout=subprocess.PIPE, text=True)
        with contextlib.suppress(ValueError, IndexError):
            yield stage, json.loads(done.stdout.splitlines()[-1])
            continue
        raise SystemExit(f"{family} {stage} ended with exit code {done.returncode}")


def run_stage(name: str, folder: Path, work: Path) -> dict[str, Any]:
    kind, _, method = name.partition(":")
    if kind == "erase":
        return erase(folder, method, work / f"{folder.name}-{method}.lprompt.safetensors")
    return {"load": load, "inference": inference, "unet_calls": unet_calls}[kind](folder)


def table(found: dict[str, Any]) -> str:
    """One line a figure, as the README shows it."""
    rows = [f"machine: {found['machine']}"]
    for family in (name for name in found if name != "machine"):
        one = found[family]
        plain = one["inference"]["peak"]
        calls = one["unet_calls"]
        rows.append(f"{family}: load x{one['load']['load']} of diffusers ({one['load']['seconds']} s)")
        shut = ", ".join(f"{count}: x{value}" for count, value in calls["shut"].items())
        opened = ", ".join(f"{count}: x{value}" for count, value in calls["one open"].items())
        attach = ", ".join(f"{count}: {value} s" for count, value in calls["attach"].items())
        rows += [f"  UNet call, all shut  {shut}", f"  UNet call, one open  {opened}", f"  attach  {attach}"]
        for method in ("uce", "zap"):
            made = one[f"erase:{method}"]
            more = (made["peak"] - plain) / 2**30
            phases = ", ".join(f"{name} {value} s" for name, value in made["phases"].items())
            rows.append(
                f"  erase {method}  {made['seconds']} s ({phases}), {made['bytes']} bytes,"
                f" peak {made['peak'] / 2**30:.2f} GiB, {more:+.2f} GiB to plain inference"
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--work", type=Path, default=Path("build-real-size"))
    parser.add_argument("--output", type=Path, help="where the figures go as JSON")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(run_stage(args.stage, args.folder, args.work)))
        return
    found: dict[str, Any] = {"machine": machine()}
    for family in args.family:
        folder = args.work / family
        if not (folder / "model_index.json").is_file():
            build(family, folder, None if torch.cuda.is_available() else NARROW)
        found[family] = {}
        for stage, figures in stages(family, folder, args.work):
            found[family][stage] = figures
            print(f"{family} {stage} {json.dumps(figures)}", file=sys.stderr, flush=True)
    print(table(found))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
