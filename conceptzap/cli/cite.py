"""Print BibTeX of what made erasures: papers and conceptzap.

    conceptzap cite van-gogh
    conceptzap cite *.lprompt.safetensors --json
"""

from __future__ import annotations

from conceptzap.cli import _options as options


def run(paths: options.Files, as_json: options.AsJson = False) -> None:
    from conceptzap import api
    from conceptzap.terminal import show
    from conceptzap.terminal.progress import Progress

    found = api.cite(paths, Progress())
    if as_json:
        entries = [{"key": key, "bibtex": entry} for key, entry in found.items()]
        show.emit("cite", {"entries": entries})
    elif show.is_quiet():
        show.lines(found)
    else:
        show.lines(["\n\n".join(found.values())])
