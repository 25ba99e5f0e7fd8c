"""What many erasure files cost at once, as ratios within one run: UNet calls, attaching, one file of all.

    python tests/benchmarks/many_files.py [--rounds 7] [--files 1 10 100 1000] [--skip-file]

The UNet is Stable Diffusion 1.5's with random weights in fp32, two rows (as with guidance) of 8 x 8
latents, so that whatever a file costs weighs most. Every file is like one of the default method's: 8
learned tokens and a rank-12 closed form at all 16 cross-attentions, behind a gate of 4 directions of
its own. Seconds are of this process's CPU on one thread; each round times the base and every case in
changing order, and the ratio is the median over the rounds. `new text` is a call whose gates are read.
`preserved` says in how many of some texts a call is the base's bit for bit while all gates stay shut, in how
many one open file acts among the others as it does alone, and whether the stack is the same in any order.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conceptzap import format
from conceptzap.base.single_file import CONFIGS
from conceptzap.edit import BaseRef, Edit, Erasure, Gate, Header, stack
from conceptzap.runtime.attach import Attachment

WIDTH, TOKENS, RANK, DIRECTIONS = 768, 8, 12, 4
OPEN, SHUT = -1e9, 1e9  # thresholds that every text passes, and none


def seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def unet() -> Any:
    """Random weights of unit gain on the shipped config, fp32."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    config = json.loads((CONFIGS / "sd1" / "unet" / "config.json").read_text())
    with init_empty_weights():
        made = UNet2DConditionModel.from_config(config)
    made = made.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in made.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return made


def erasure(sites: Sequence[str], number: int, threshold: float) -> Erasure:
    """File number `number`: gates and tensors of its own, everything else alike."""
    generator = torch.Generator().manual_seed(number)

    def randn(*shape: int) -> Tensor:
        return 0.05 * torch.randn(shape, generator=generator)

    detector = {"query": randn(DIRECTIONS, WIDTH).half(), "mean": randn(WIDTH).half()}
    gate = Gate("match", {"threshold": threshold}, detector)
    rows = {f"prompt_{letter}": randn(TOKENS, WIDTH).half() for letter in "kv"}
    pair = {"into": randn(WIDTH, RANK).half(), "down": randn(RANK, WIDTH).half()}
    layers = tuple(f"{site}.to_{letter}" for site in sites for letter in "kv")
    edits = (Edit("tokens", tuple(sites), rows, gates=(gate,)), Edit("weight", layers, pair, gates=(gate,)))
    prints = {"attn2": "0" * 64, "text": "0" * 64}
    base = BaseRef("sd1", "random", "", "0" * 64, prints)
    change = dict.fromkeys(sorted({site for edit in edits for site in edit.sites}), 0.1)
    names = sorted(edit.name for edit in edits)
    test = {names[0]: {"edits": names, "prompt": "a", "seed": 0, "change": change}}
    return Erasure(Header(f"concept {number}", (f"concept {number}",), ("",), base, canary=test), edits)


class Bench:
    """A UNet, its inputs and the files."""

    def __init__(self, files: Sequence[int]) -> None:
        self.unet, self.files = unet(), files
        names = [name for name, _ in self.unet.named_modules() if name.endswith(".attn2")]
        self.sites = [f"unet.{name}" for name in names]
        shut = [erasure(self.sites, number, SHUT) for number in range(max(files))]
        self.erasures = [format.seal(one) for one in shut]
        self.latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        self.texts = torch.randn(64, 2, 77, WIDTH, generator=torch.Generator().manual_seed(1)).unbind()

    def edits(self, shut: int, opened: int = 0) -> list[Edit]:
        """Those of `shut` files whose gates stay shut, after `opened` whose gates are open."""
        found = [e for n in range(opened) for e in erasure(self.sites, 5000 + n, OPEN).edits]
        return found + [edit for one in self.erasures[:shut] for edit in one.edits]

    def cases(self) -> dict[str, list[Edit]]:
        most = max(self.files)
        shut = {f"{n} shut": self.edits(n) for n in self.files}
        return shut | {f"{most} with one open": self.edits(most - 1, 1), "one open": self.edits(0, 1)}

    @torch.no_grad()
    def call(self, text: Tensor) -> Tensor:
        return self.unet(self.latents, 500, encoder_hidden_states=text).sample

    def ratios(self, rounds: int) -> dict[str, dict[str, float]]:
        """Median ratio to the base's call, for each case: of a later call, and of one with a new text."""
        later: dict[str, list[float]] = {}
        fresh: dict[str, list[float]] = {}
        cases = self.cases()
        self.call(self.texts[0])
        for turn in range(rounds):
            base = min(seconds(lambda: self.call(self.texts[0])) for _ in range(2))
            for name in list(cases)[:: -1 if turn % 2 else 1]:
                attachment = Attachment(self.unet, cases[name])
                new, text = (self.texts[turn % 64], self.texts[turn % 64].clone())
                self.call(new)
                fresh.setdefault(name, []).append(seconds(lambda t=text: self.call(t)) / base)
                took = min(seconds(lambda t=text: self.call(t)) for _ in range(2))
                later.setdefault(name, []).append(took / base)
                receipt = attachment.receipt
                receipt.verify(4)
                attachment.remove()
            self.call(self.texts[0])
        median = statistics.median
        return {n: {"call": round(median(later[n]), 3), "new text": round(median(fresh[n]), 3)} for n in cases}

    def attaching(self) -> dict[str, float]:
        """Seconds to attach the first, and all of them, as loaded."""
        found = {}
        for n in (1, max(self.files)):
            edits, made = [replace(edit) for edit in self.edits(n)], []
            found[f"{n}"] = round(seconds(lambda e=edits, m=made: m.append(Attachment(self.unet, e))), 3)
            made[0].remove()
        return found

    @torch.no_grad()
    def preserved(self, texts: int = 4) -> dict[str, Any]:
        """What the most files leave as it is; both counts are of `texts`."""
        most = max(self.files)
        asked = self.texts[:texts]

        def drawn(edits: list[Edit]) -> list[Tensor]:
            attachment = Attachment(self.unet, edits)
            made = [self.call(text) for text in asked]
            attachment.remove()
            return made

        bare, shut, alone = drawn([]), drawn(self.edits(most)), drawn(self.edits(0, 1))
        beside = drawn(self.edits(most - 1, 1))
        changed = sum(not one.equal(other) for one, other in zip(bare, alone, strict=True))
        found = {"texts": texts, "an open file changes": changed}
        for name, pair in (("shut are the base's", (bare, shut)), ("open as alone", (alone, beside))):
            found[name] = sum(one.equal(other) for one, other in zip(*pair, strict=True))
        digests = {format.seal(stack(some)).digest for some in (self.erasures, self.erasures[::-1])}
        return {**found, "in any order the same": len(digests) == 1}

    def one_file(self) -> dict[str, float]:
        """Seconds to stack all files, to write the stack, and to read it back."""
        stacked: list[Any] = []
        times = {"stack": seconds(lambda: stacked.append(stack(self.erasures)))}
        times["dump"] = seconds(lambda: stacked.append(format.dumps(stacked[0])))
        times["read"] = seconds(lambda: stacked.append(format.parse(stacked[1])))
        rounded = {name: round(value, 2) for name, value in times.items()}
        return rounded | {"megabytes": round(len(stacked[1]) / 1e6, 1), "edits": len(stacked[2].edits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="of timing; 0 times nothing")
    parser.add_argument("--files", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--skip-file", action="store_true", help="no stacking into one file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args.files)
    result: dict[str, Any] = {"preserved": bench.preserved()}
    if args.rounds:
        result["attach seconds"] = bench.attaching()
        result["ratio to the base"] = bench.ratios(args.rounds)
    if not args.skip_file:
        result["one file, seconds"] = bench.one_file()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
