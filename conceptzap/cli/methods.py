"""List the methods, or the settings of one.

    conceptzap methods
    conceptzap methods kpop
"""

from __future__ import annotations

from conceptzap.cli import _options as options


def run(name: options.SettingsOf = None, as_json: options.AsJson = False) -> None:
    from conceptzap.registry import catalog
    from conceptzap.terminal import show

    if as_json:
        found = [catalog.method(name)] if name else catalog.methods()
        show.emit("methods", {"methods": found})
    elif name:
        show.method(catalog.method(name))
    else:
        show.methods(catalog.methods())
