"""How a base that cannot be used is refused: shared by the tests of loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conceptzap.base import load_base
from conceptzap.errors import ConceptZapError


def refusal(kind: type[ConceptZapError], name: Path | str, **options: str) -> ConceptZapError:
    """The error of exactly this kind that loading `name` raises: one line, with a hint."""
    with pytest.raises(kind) as caught:
        load_base(str(name), device="cpu", **options)
    error = caught.value
    assert type(error) is kind
    assert "\n" not in str(error)
    assert error.hint and "\n" not in error.hint
    return error


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
