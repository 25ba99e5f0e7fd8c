"""What the report's templates are given of pictures, rankings and attention, as plain values."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from conceptzap.evaluation.comparison import Annotation, Comparison, Sample

PICTURE = 128  # pixels that a picture takes on the page, on its longer side
LARGEST = 384  # pixels that are kept of it, to be enlarged
QUALITY = 88  # of a JPEG; pictures that fit the page as they are stay PNG
FREQUENT = 10
RAMP = np.array([[18, 16, 54], [128, 38, 110], [240, 110, 80], [255, 232, 158]], float)
VEIL = 0.62  # how much of an attention map covers its picture


@dataclass(frozen=True)
class Shown:
    """An inline picture: its data URI, its width and height on the page, whether its pixels are sharp."""

    source: str
    width: int
    height: int
    sharp: bool


def picture(array: np.ndarray) -> Shown:
    """A picture [h, w, 3] uint8 for the page: small ones bit for bit, larger ones as a JPEG."""
    image = Image.fromarray(array)
    scale = PICTURE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    small = scale >= 1
    image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    if small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Shown(f"data:image/{'png' if small else 'jpeg'};base64,{data}", width, height, small)


def heat(weights: np.ndarray, under: np.ndarray) -> Shown:
    """A map [side, side], dark to bright over its own range, laid over a picture [h, w, 3] in grey."""
    grey = Image.fromarray(under).convert("L")
    scale = PICTURE / max(grey.size)
    size = tuple(max(1, round(side * scale)) for side in grey.size)
    low, high = float(weights.min()), float(weights.max())
    level = (255 * (weights - low) / max(high - low, 1e-9)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(level).resize(size, Image.Resampling.BICUBIC))  # [h, w]
    stops = np.linspace(0, 255, len(RAMP))
    colours = np.stack([np.interp(smooth, stops, channel) for channel in RAMP.T], -1)  # [h, w, 3]
    below = np.asarray(grey.resize(size), float)[..., None]
    return picture((VEIL * colours + (1 - VEIL) * below).astype(np.uint8))


def firsts(annotation: Annotation) -> str:
    """The first label of every judge: `object=cat|fox; style=photo|photo`."""
    kinds = (
        f"{kind}={'|'.join(ranked[0] if ranked else '-' for ranked in rankings)}"
        for kind, rankings in annotation.labels.items()
    )
    return "; ".join(kinds)


def labels(annotation: Annotation) -> str:
    """The same for people, line by line: `object: cat / fox`."""
    lines = [line.replace("=", ": ").replace("|", " / ") for line in firsts(annotation).split("; ")]
    return "\n".join([*filter(None, lines), *([] if annotation.valid else ["no sound picture"])])


def seen(sample: Sample) -> str:
    """What the first judge of every kind sees in the erased picture."""
    tops = (rankings[0][0] for rankings in sample.after.labels.values() if rankings and rankings[0])
    return ", ".join(tops)


@dataclass(frozen=True)
class Confusion:
    """What an erased concept's pictures are seen as: label, its share before, its share after."""

    concept: str
    kind: str
    rows: tuple[tuple[str, float, float], ...]


def confusions(comparison: Comparison) -> list[Confusion]:
    """What the judges see in an erased concept's pictures; most frequent first."""
    found = []
    for kind, concept in comparison.targets:
        samples = comparison.erased(concept)
        before, after = (_counts(samples, when, kind) for when in ("before", "after"))
        names = sorted(before | after, key=lambda label: -(before[label] + after[label]))[:FREQUENT]
        total = max(1, sum(before.values()))
        rows = tuple((label, before[label] / total, after[label] / total) for label in names)
        found.append(Confusion(concept, kind, rows))
    return found


def _counts(samples: Iterable[Sample], when: str, kind: str) -> Counter[str]:
    rankings = (ranked for one in samples for ranked in getattr(one, when).labels.get(kind, ()))
    return Counter(ranked[0] if ranked else "nothing" for ranked in rankings)


def mistakes(comparison: Comparison) -> list[tuple[str, str, int]]:
    """Kept labels that a judge takes for another one after erasing and did not before: (asked, seen, n)."""
    found: Counter[tuple[str, str]] = Counter()
    for kind, label in comparison.kept_labels:
        for sample in comparison.asking(kind, label):
            if sample.depth(kind) == 1 and sample.before.kept(kind, label):
                tops = (r[0] for r in sample.after.labels.get(kind, ()) if r and r[0] != label)
                found.update((label, top) for top in set(tops))
    return [(asked, now, n) for (asked, now), n in found.most_common(FREQUENT)]
