"""The file `lprompt/1` and whatever else is written to disk: whole or not at all. No torch at import."""

from conceptzap.format.lprompt import (
    ARCHITECTURES,
    FORMAT,
    SUFFIX,
    Info,
    digest_of,
    dumps,
    load,
    parse,
    read_header,
    save,
    seal,
)

__all__ = [
    "ARCHITECTURES", "FORMAT", "SUFFIX", "Info", "digest_of", "dumps", "load", "parse", "read_header",
    "save", "seal",
]  # fmt: skip
