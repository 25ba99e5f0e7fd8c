"""Show what erasures, checkpoints and LoRAs hold.

    conceptzap inspect van-gogh.lprompt.safetensors
    conceptzap inspect . --json

Concepts, base, method, edits by op and layer, scores, digest. Every bit of an erasure is verified;
torch and its checkpoint are not needed. Of a checkpoint or a LoRA: family, prediction, sizes, and
what an export of ours has erased in it. A folder of erasures is a line for each.
"""

from __future__ import annotations

from conceptzap.cli import _errors
from conceptzap.cli import _options as options


def run(paths: options.Files, as_json: options.AsJson = False) -> None:
    from conceptzap.errors import ConceptZapError
    from conceptzap.terminal import models, show
    from conceptzap.verbs import inspecting, overlaps

    found, other, bad, known = [], [], [], {}
    every = [inside for path in paths for inside in inspecting.among(path)]
    for path in every:
        try:
            one = inspecting.examine_one(path)
            if isinstance(one, inspecting.Model):
                other.append(models.record(one))
            else:
                found.append(show.info_record(one))
                if any(edit["role"] == "erase" for edit in one.edits):  # a key gives back
                    known[one.digest] = one.header, show.shown(one.path)
        except ConceptZapError as error:
            bad.append(error)
    if len(every) == 1 and bad:
        raise bad[0]
    headers, names = zip(*(known[digest] for digest in sorted(known)), strict=True) if known else ((), ())
    twice = overlaps.repeated(headers, names)
    if as_json:
        more = {"models": other} if other else {}
        same = {"overlaps": {"concepts": twice}} if twice else {}
        show.emit("inspect", {"files": found, **more, **same, **_errors.among(bad)})
    elif len(every) > len(paths):
        models.catalogue(found)
    else:
        for record in found:
            show.info(record)
    for concept, files in twice.items() if not as_json else ():
        show.warn(f"{concept!r} is erased by {len(files)} of these files: {overlaps.listed(files)}")
    for record in other if not as_json else ():
        models.show(record)
    _errors.leave(bad, as_json)
