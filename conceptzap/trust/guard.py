"""Policies with their base at hand: write one, or prove that all of one is in force."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from conceptzap import format
from conceptzap.format import atomic, naming
from conceptzap.trust import attested, policy
from conceptzap.trust.lockfile import NAME, Policy


def lock(
    paths: Sequence[Path],
    base: str | os.PathLike[str] = "demo",
    output: Path | str = NAME,
    *,
    force: bool = False,
    prediction: str | None = None,
    attacked: Iterable[Path | str] = (),
    fail_over: Iterable[str] = (),
) -> Policy:
    """Write a policy that pins these erasure files on the base called `base`, and results of attacks.

    Files and target are checked before the base is loaded. Raises what `policy.write` raises.
    """
    attacked, limits = attested.asked(attacked, fail_over)
    paths, output, base = [naming.existing(path) for path in paths], naming.place(output), os.fspath(base)
    atomic.check_writable(output, force)
    for path in paths:
        format.read_header(path)
    from conceptzap.base import load_base

    here = load_base(base, prediction=prediction)
    reference = here.reference(policy.EVERYTHING)
    return policy.write(output, reference, base, paths, force, prediction, attacked, limits)


def verify(path: Path | str = NAME, device: str = "auto") -> Policy:
    """The policy, once all of it holds: versions, files, the base's weights, every edit's self-test.

    Raises `RefusedError` with every reason otherwise.
    """
    held = policy.read(naming.place(path))
    policy.verify_files(held)
    from conceptzap.base import load_base
    from conceptzap.trust import canary

    here = load_base(held.locate_base(), device, prediction=held.prediction)
    canary.check_all(here, [(erasure, True) for erasure in policy.enforce(held, here)])
    return held
