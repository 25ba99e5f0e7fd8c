"""What somebody writes who uses every verb, with the types that they expect. Read by mypy and pyright,
never run: `test_python.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import conceptzap


def erase_and_draw() -> conceptzap.Erasure:
    plan = conceptzap.plan("Van Gogh", anchors="painting")
    print(plan["method"])
    made: conceptzap.ErasedFile = conceptzap.erase("Van Gogh", anchors="painting", kind="style", seed=3)
    leak: conceptzap.Score = made.scores["leak"]
    print(made.verdict, leak.value, leak.low, leak.high, made.preview)
    for picture in conceptzap.generate(["a cat"], erasures=[(made.path, 0.5)], width=64, strengths=(0, 1)):
        where: Path = picture.save("cat.png", force=True)
        size: tuple[int, int] = picture.image.size
        pixels: np.ndarray = picture.array
        print(where, size, picture.seed, picture.text["parameters"], pixels.shape)
    return made.erasure


def erase_many() -> None:
    plans = conceptzap.plan_all("concepts.toml", method="uce")
    done: conceptzap.ErasedAll = conceptzap.erase_all(["cat", {"name": "dog", "keep": ["cat"]}], limit=0)
    digests: list[str] = [one.digest for one in done.files]
    print(plans["output"], digests, done.stack.path if done.stack else "", [one.command for one in done.failed])


def files(erasure: conceptzap.Erasure) -> None:
    loaded: conceptzap.Erasure = conceptzap.load("x")
    both = conceptzap.stack([erasure, loaded.scaled(0.5), Path("y")])
    stacked: conceptzap.Stacked = conceptzap.stack_files(["x", "y"], "z", base="demo", elastic=True)
    print(stacked.path, stacked.digest, stacked.overlaps.concepts)
    digest: str = conceptzap.save(both, "z", force=True)
    info: conceptzap.Info = conceptzap.inspect("z")
    title: str = info.header.title
    for found in conceptzap.examine("folder"):
        print(found.kind if isinstance(found, conceptzap.Model) else found.digest)
    out: conceptzap.Exported = conceptzap.export("z", "lora", "y")
    entries: dict[str, str] = conceptzap.cite("z")
    shared: conceptzap.Pushed = conceptzap.push("z", "someone/erasures", private=True, dry_run=True)
    print(shared.name, shared.commit, shared.card)
    print(digest, title, out.path, list(entries), loaded == erasure, {loaded, erasure})


def bring() -> None:
    made: conceptzap.ErasedFile = conceptzap.import_("leco.safetensors", "Van Gogh", form="lora")
    print(made.path, made.digest)


def attach(erasure: conceptzap.Erasure) -> None:
    pipe = conceptzap.demo_pipeline()
    with conceptzap.apply(pipe, erasure, strength=0.5) as handle:
        handle.strength = 1.0
        handle.disable()
        handle.enable()
    handles: tuple[conceptzap.Handle, ...] = conceptzap.applied(pipe)
    for handle in handles:
        handle.remove()
    conceptzap.remove(pipe)
    for picture in conceptzap.generate("a cat", base=pipe, report=conceptzap.Bars()):
        print(picture)


def measure(erasure: conceptzap.Erasure) -> None:
    done: conceptzap.Evaluation = conceptzap.evaluate(erasure, suite="quick", output="out")
    scores: list[float] = [score.value for score in done.result.scores]
    results: dict[str, conceptzap.Result] = conceptzap.compare([done.written["folder"], "other"])
    tried: conceptzap.Attacked = conceptzap.attack(erasure, "inversion", budget="quick")
    hard: conceptzap.HardenedFile = conceptzap.harden("x", "quick", force=True)
    print(hard.path, hard.digest, dict(hard.rounds))
    matrix: conceptzap.Bench = conceptzap.bench(methods=["uce"], concepts=["church:house"], limit=4)
    print(scores, list(results), tried.asr.value, len(matrix.failed))


def guard() -> None:
    policy: conceptzap.Policy = conceptzap.lock(["x", "y"], fail_over=["E=90"])
    same: conceptzap.Policy = conceptzap.verify("conceptzap.lock")
    try:
        conceptzap.erase("cat", report=conceptzap.Report())
    except conceptzap.ThresholdError as error:
        print(error.hint, error.exit_code + 1, policy.digest == same.digest)
    except conceptzap.ConceptZapError as error:
        print(error.kind)
    settings = conceptzap.Settings(steps=20)
    task = conceptzap.Task(("cat",), ("dog",), (), ("object",))
    print(settings.steps, task.pairs)


def play() -> None:
    page = conceptzap.ui("erasures", base="demo", block=False, told=lambda address: None)
    address: str = page.local_url
    print(address)
    page.close()
