"""The model card of an erasure on the hub: what it does, what was measured, how to load it, what it is not.

Markdown behind metadata that the hub reads. Texts from files are shown as they are, whatever they say.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

import jinja2

from conceptzap.edit import Header
from conceptzap.errors import escape
from conceptzap.evaluation import verdict
from conceptzap.format import container, naming
from conceptzap.format.lprompt import ARCHITECTURES, THUMBNAIL, Info
from conceptzap.registry import family, hub
from conceptzap.words import with_article

METHODS = "methods"
DEMO = "demo"
PUNCTUATION = re.compile(r"([!-*:-@\[-`{-~])")  # what Markdown or HTML may take for something else
MEANS = {
    "leak": "pictures of the concept in which a classifier still sees it",
    "preservation": "of what classifiers recognised in other pictures, the share that stays",
}
KEPT = "pictures of the concept in which what else was asked for is still seen: {}"


def markdown(info: Info, place: str, picture: str, licence: str, bibtex: Mapping[str, str], spec: Any) -> str:
    """The whole card of the file called `place` (`hf://user/repo/file`), beside a `picture` if there is one.

    `licence` is an identifier of the hub, "" for that of the base. `spec`: the file's ModelSpec entries.
    """
    head = info.header
    return _template().render(
        meta={key: json.dumps(value) for key, value in _metadata(info, licence).items() if value},
        info=info,
        head=head,
        place=place,
        prompt=telling(head),
        name=naming.bare(place),
        picture=picture,
        licence=licence,
        pairs=list(zip(head.concepts, head.anchors, strict=True)),
        shown=_shown(info),
        restores=all(edit["role"] == "key" for edit in info.edits),
        methods=_methods(info),
        hardened=any("harden" in made for made in head.made),
        scores=[_score(name, score) for name, score in head.scores.items()],
        hub_base=_hub_base(info),
        demo=head.base.id == DEMO,
        bibtex="\n\n".join(bibtex.values()),
        spec=spec,
    )


def _shown(info: Info) -> float:
    """The share of its pictures in which the file's own figures still see the concept; 0 where it is gone."""
    leak = info.header.scores.get("leak", {}).get("value", 0.0)
    return leak if leak > verdict.LEAKS else 0.0


def telling(head: Header) -> str:
    """A prompt that shows what is gone: a style alone draws nothing that could be looked at."""
    kinds = [kind for made in head.made for kind in made.get("kinds", ())]
    if len(head.concepts) != 1:
        return head.concepts[0] if head.concepts else "a picture"
    concept = head.concepts[0]
    if kinds == ["style"]:
        return f"a cat by {concept}"
    thing = kinds == ["object"] or (not kinds and concept == concept.lower())
    return with_article(concept) if thing else concept


def modelspec(data: bytes) -> dict[str, str]:
    """What the bytes of a file say of it to other programs, but for the picture."""
    metadata = container.split(data)[0]
    told = {key: value for key, value in sorted(metadata.items()) if key.startswith("modelspec.")}
    return {key: value for key, value in told.items() if key != THUMBNAIL}


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("conceptzap.page"), autoescape=False,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"md": plain, "sh": _word, "py": json.dumps}
    return environment.get_template("card.md.j2")


def plain(text: object) -> str:
    """One line of somebody's text that Markdown shows as it is."""
    return PUNCTUATION.sub(r"\\\1", escape(text))


def _word(text: object) -> str:
    return shlex.quote(escape(text))


def _metadata(info: Info, licence: str) -> dict[str, Any]:
    """What the hub finds it by; an erasure has its base's licence unless somebody says another."""
    base = _hub_base(info)
    ours = {} if licence else {"license_name": "as-the-base"}
    architecture = ARCHITECTURES.get(info.header.base.family, ("stable-diffusion",))[0]
    return {
        "license": licence or "other", **ours,
        "base_model": base, "base_model_relation": "adapter" if base else "",
        "library_name": "conceptzap", "pipeline_tag": "text-to-image",
        "tags": ["conceptzap", "concept-erasure", "stable-diffusion", architecture],
    }  # fmt: skip


def _hub_base(info: Info) -> str:
    """The base's name on the hub, "" for one that has none."""
    return info.header.base.id if hub.is_repo(info.header.base.id) else ""


def _methods(info: Info) -> list[dict[str, str]]:
    """Name, summary and paper of each that made the file; a name alone where it is not known here."""
    names = dict.fromkeys(str(made.get("method", "unknown")) for made in info.header.made)
    known = family.members(METHODS)
    empty = {"summary": "", "paper": ""}
    return [{**empty, **(family.describe(METHODS, n) if n in known else {}), "name": n} for n in names]


def _score(name: str, score: Mapping[str, Any]) -> dict[str, Any]:
    """A score's cells: shares in percent."""
    kept = KEPT.format(name.removesuffix("_kept")) if name.endswith("_kept") else ""
    values = [float(score[key]) for key in ("value", "low", "high")]
    share = all(0 <= value <= 1 for value in values)
    value, low, high = (f"{100 * one:.1f} %" if share else f"{one:.3g}" for one in values)
    about = MEANS.get(name, kept)
    return {"name": name, "about": about, "value": value, "low": low, "high": high, "n": score["n"]}
