"""Show what erasure files hold.

    conceptzap inspect van-gogh.lprompt.safetensors
    conceptzap inspect *.lprompt.safetensors --json

Concepts, base, method, edits by op and site, scores, digest. Every bit of a file is verified; torch
and the checkpoint are not needed.
"""

from __future__ import annotations

from conceptzap.cli import _errors
from conceptzap.cli import _options as options


def run(paths: options.Files, as_json: options.AsJson = False) -> None:
    from conceptzap import api
    from conceptzap.errors import ConceptZapError
    from conceptzap.terminal import show

    found, bad = [], []
    for path in paths:
        try:
            found.append(show.info_record(api.inspect(path)))
        except ConceptZapError as error:
            bad.append(error)
    if len(paths) == 1 and bad:
        raise bad[0]
    if as_json:
        show.emit("inspect", {"files": found, **_errors.among(bad)})
    else:
        for record in found:
            show.info(record)
    _errors.leave(bad, as_json)
