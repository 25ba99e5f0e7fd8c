"""List the attacks, or the settings of one.

    conceptzap attacks
    conceptzap attacks inversion
"""

from __future__ import annotations

from conceptzap.cli import _options as options


def run(name: options.SettingsOf = None, as_json: options.AsJson = False) -> None:
    from conceptzap.registry import catalog
    from conceptzap.terminal import show

    if as_json:
        found = [catalog.attack(name)] if name else catalog.attacks()
        show.emit("attacks", {"attacks": found})
    elif name:
        show.attack(catalog.attack(name))
    else:
        show.attacks(catalog.attacks())
