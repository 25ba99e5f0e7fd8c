"""BibTeX of publications by their arXiv numbers: `presets/papers.bib`, one entry a paper. No torch."""

from __future__ import annotations

import re
from functools import cache

from conceptzap.registry import config

ENTRY = re.compile(r"^@\w+\{([^,\s]+),\n.*?^\}$", re.MULTILINE | re.DOTALL)


@cache
def entries() -> dict[str, str]:
    """arXiv number -> its entry."""
    text = (config.PRESETS / "papers.bib").read_text(encoding="utf-8")
    return {found[1]: found[0] for found in ENTRY.finditer(text)}
