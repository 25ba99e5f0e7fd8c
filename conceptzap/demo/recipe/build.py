"""Build the demo checkpoint from nothing: `python -m conceptzap.demo.recipe.build --work DIR`.

Stages run in order and each is skipped when its result is in the work folder; a stage stopped
half way goes on from its last checkpoint. Give the same options again to go on. With --shipped-vae
pictures go through the VAE of the checkpoint that is shipped, and no judges are trained: for a UNet
beside it, such as one that never knew a concept.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from conceptzap.base.loading import DEMO_FOLDER
from conceptzap.demo import judge_nets
from conceptzap.demo.recipe import art, render, train_judges, train_unet, train_vae
from conceptzap.demo.recipe.package import write_checkpoint
from conceptzap.demo.recipe.training import Recipe, load_average
from conceptzap.demo.world import OBJECTS, STYLES, resolve

PERCEPTUAL = Recipe("perceptual", 700, 3e-3, 77, weight_decay=0.05, ema=0.99)
JUDGES = (
    Recipe("residual", 1500, 3e-3, 101, weight_decay=0.05, ema=0.99),
    Recipe("attention", 2000, 1.5e-3, 202, weight_decay=0.05, ema=0.99),
)
STYLE_HEAD = Recipe("attention-style", 400, 5e-3, 203, weight_decay=0.01, ema=0.98, warmup=20)
VAE = Recipe("vae", 3000, 1e-3, 12, weight_decay=0.0, ema=0.995)
UNET_STEPS = 5900
STAGES = ("fetch", "render", "judges", "vae", "unet", "package")


class Build:
    """One work folder and the stages that fill it."""

    def __init__(
        self, work: Path, tarballs: Path, device: torch.device, without: str = "",
        steps: int = UNET_STEPS, shipped_vae: bool = False,
    ) -> None:
        self.work, self.tarballs, self.device = work, tarballs, device
        self.excluded, self.steps, self.shipped_vae = without, steps, shipped_vae
        self.suffix = f"-without-{without.replace(' ', '-').lower()}" if without else ""
        self.items = render.catalogue()
        work.mkdir(parents=True, exist_ok=True)

    def fetch(self) -> None:
        """The emoji packages, checked."""
        art.fetch(self.tarballs)

    def render(self) -> None:
        """All pictures, into `renders.npy`."""
        target = self.work / "renders.npy"
        if not target.exists():
            pictures = render.render_all(self.items, self.tarballs, os.cpu_count() or 1)
            _save_array(target, pictures)

    def judges(self) -> None:
        """The perceptual network and both judges, frozen into `judges/`; nothing with the shipped VAE."""
        if self.shipped_vae:
            return
        renders = self._renders()
        eye = train_judges.perceptual_net()
        train_judges.train_classifier(
            eye, renders, PERCEPTUAL, self.work / "perceptual", self.device)
        nets, scores = {}, {}
        for recipe in JUDGES:
            torch.manual_seed(recipe.seed)
            net = judge_nets.build_judge(recipe.name, len(OBJECTS), len(STYLES))
            folder = self.work / recipe.name
            nets[recipe.name] = train_judges.train_classifier(
                net, renders, recipe, folder, self.device)
            if recipe.name == "attention":
                train_judges.refit_style(
                    net, renders, STYLE_HEAD, self.work / STYLE_HEAD.name, self.device)
            scores[recipe.name] = train_judges.accuracy(net, renders, self.device)
            print(recipe.name, scores[recipe.name])
        train_judges.freeze(nets, scores, self.work / "judges")

    def vae(self) -> None:
        """The VAE, and the latents of all pictures, into `latents.npy`."""
        target = self.work / "latents.npy"
        if target.exists():
            return
        renders = self._renders()
        if not self.shipped_vae:
            eye = train_judges.perceptual_net()
            load_average(eye, self.work / "perceptual")
            vae = train_vae.build_vae()
            train_vae.train_vae(vae, eye, renders, VAE, self.work / "vae", self.device)
        _save_array(target, train_vae.encode_all(self._vae().to(self.device), renders, self.device))

    def unet(self) -> None:
        """The UNet and the text encoder, without the pictures of an excluded concept."""
        painter, tokenizer = train_unet.build_painter()
        latents = np.load(self.work / "latents.npy")
        latents /= latents.std()
        chosen = train_unet.without(self.items, self.excluded)
        recipe = Recipe("unet", self.steps, 1e-3, 31, ema=0.9985)
        train_unet.train_unet(
            painter, tokenizer, [self.items[i] for i in chosen], latents[chosen], recipe,
            self.work / f"unet{self.suffix}", self.device)

    def package(self) -> None:
        """The newest averaged weights as a diffusers folder `checkpoint/`."""
        painter, tokenizer = train_unet.build_painter()
        step = load_average(painter, self.work / f"unet{self.suffix}")
        spread = float(np.load(self.work / "latents.npy", mmap_mode="r").std())
        folder = self.work / f"checkpoint{self.suffix}"
        size = write_checkpoint(painter, tokenizer, self._vae(), spread, folder)
        print(f"{folder}: {size / 1e6:.1f} MB, from step {step}")

    def _vae(self) -> AutoencoderKL:
        """The shipped one, or the newest averaged weights of our own, in fp32."""
        if self.shipped_vae:
            return AutoencoderKL.from_pretrained(DEMO_FOLDER, subfolder="vae").float().eval()
        vae = train_vae.build_vae()
        load_average(vae, self.work / "vae")
        return vae.eval()

    def _renders(self) -> train_judges.Renders:
        return train_judges.Renders.of(self.items, np.load(self.work / "renders.npy"))


def _save_array(target: Path, values: np.ndarray) -> None:
    partial = target.with_suffix(".part.npy")
    np.save(partial, values)
    os.replace(partial, target)


def main() -> None:
    """Parse the command line and run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--tarballs", type=Path, help="folder of the npm archives, if at hand")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--without", default="", metavar="CONCEPT", help="train without a concept")
    parser.add_argument("--stage", action="append", choices=STAGES, help="only this stage")
    parser.add_argument("--steps", type=int, default=UNET_STEPS, help="steps of the UNet")
    parser.add_argument("--shipped-vae", action="store_true", help="train neither judges nor a VAE")
    args = parser.parse_args()
    excluded = resolve(args.without) if args.without else ""
    if excluded is None:
        parser.error(f"--without {args.without!r}: the demo world has no such concept")
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: must be at least 1")
    build = Build(args.work, args.tarballs or args.work / "tarballs", torch.device(args.device),
                  excluded, args.steps, args.shipped_vae)
    for stage in args.stage or STAGES:
        getattr(build, stage)()


if __name__ == "__main__":
    main()
