"""Fetch the four sets of emoji drawings and read single drawings from them.

The packages come from the npm registry, pinned by version and sha512. They are needed to rebuild
the checkpoint, never to use it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from conceptzap.demo.world import Object

SIZE = 128


@dataclass(frozen=True, slots=True)
class Package:
    """A pinned npm package and where a drawing lies in it."""

    drawing: str
    name: str
    version: str
    sha512: str
    member: str
    licence: str

    @property
    def filename(self) -> str:
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def url(self) -> str:
        base = self.name.split("/")[-1]
        return f"https://registry.npmjs.org/{self.name}/-/{base}-{self.version}.tgz"


PACKAGES = (
    Package(
        "noto", "emoji-datasource-google", "16.0.0",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        "package/img/google/64/{codepoint}.png", "Apache-2.0",
    ),
    Package(
        "twemoji", "emoji-datasource-twitter", "16.0.0",
        "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        "package/img/twitter/64/{codepoint}.png", "CC BY 4.0",
    ),
    Package(
        "fluent-3d", "@lobehub/fluent-emoji-3d", "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "package/assets/{codepoint}.webp", "MIT",
    ),
    Package(
        "fluent-flat", "fluentui-emoji", "1.3.0",
        "JTXXwqIie2rWTgOkIJDJxr0WtwTz2WU4kdOq8buLVThYwQ264aFR2jdTyuon2oEbLqqGMT64zI4btyn1saB2xw==",
        "package/icons/flat/{flat}.svg", "MIT",
    ),
)
DRAWINGS = tuple(package.drawing for package in PACKAGES)


def fetch(folder: Path) -> None:
    """Download what is missing into `folder`; every archive is checked, also one already there."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        target = folder / package.filename
        if not target.exists():
            _download(package.url, target)
        digest = base64.b64encode(hashlib.sha512(target.read_bytes()).digest()).decode()
        if digest != package.sha512:
            raise ValueError(f"{target}: not {package.name} {package.version} (sha512 differs); "
                             "remove it and run again")


def _download(url: str, target: Path) -> None:
    partial = target.with_suffix(".part")
    with urllib.request.urlopen(url, timeout=120) as reply, partial.open("wb") as out:
        while block := reply.read(1 << 20):
            out.write(block)
    os.replace(partial, target)


def read_drawings(folder: Path, objects: tuple[Object, ...]) -> dict[tuple[str, str], Image.Image]:
    """Every (object name, drawing) as a square RGBA picture of 128 px, trimmed to its ink."""
    pictures: dict[tuple[str, str], Image.Image] = {}
    for package in PACKAGES:
        wanted = {_member(package, thing): thing.name for thing in objects}
        with tarfile.open(folder / package.filename) as archive:
            for entry in archive:
                name = wanted.pop(entry.name, None)
                if name is not None:
                    data = archive.extractfile(entry).read()
                    pictures[name, package.drawing] = _square(_decode(data, entry.name))
        if wanted:
            raise ValueError(f"{package.filename}: no drawing of {', '.join(wanted.values())}")
    return pictures


def _member(package: Package, thing: Object) -> str:
    return package.member.format(codepoint=thing.codepoint, flat=thing.flat)


def _decode(data: bytes, name: str) -> Image.Image:
    if name.endswith(".svg"):
        import resvg_py

        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=256, height=256))
    return Image.open(io.BytesIO(data)).convert("RGBA")


def _square(picture: Image.Image) -> Image.Image:
    trimmed = picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    side = max(trimmed.size)
    square = Image.new("RGBA", (side, side))
    square.paste(trimmed, ((side - trimmed.width) // 2, (side - trimmed.height) // 2))
    return square.resize((SIZE, SIZE), Image.LANCZOS)
