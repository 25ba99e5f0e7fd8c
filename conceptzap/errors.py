"""Every error conceptzap raises on purpose: one line that says what, where and how to mend it.

    ConceptZapError      1  failed
    |- UsageError        2  a request that cannot be meant: unknown name, value out of range, output exists
    |- FormatError       3  not a sound .lprompt.safetensors file, or none at all
    |- MismatchError     4  a sound file that does not fit this base
    |- ResourceError     5  memory, disk, device, or a base that is not there
    |- RefusedError      6  could not be verified as erased, so nothing was drawn
    |  `- SilentEditError     an attached edit did not run
    |- ThresholdError    7  measured, and not good enough
    `- Interrupted       130 (SIGINT) or 143 (SIGTERM)

Anything else that escapes is a bug and shows as one.
"""

from __future__ import annotations

import re
import unicodedata

LONGEST_SHOWN = 200  # characters of somebody else's text in a message
# the CPU's allocator raises a plain RuntimeError that only says it
NO_MEMORY = re.compile(r"not enough memory|can't allocate memory|out of memory", re.IGNORECASE)


class ConceptZapError(Exception):
    """Base of the tree. `exit_code` is the process's, `hint` the mend, `kind` a word for machines."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        if hint:  # a traceback, as in a notebook, shows it too
            self.add_note(f"hint: {hint}")

    @property
    def kind(self) -> str:
        return type(self).__name__


class UsageError(ConceptZapError):
    """A request that cannot be meant: unknown name, value out of range, output exists."""

    exit_code = 2


class FormatError(ConceptZapError):
    """Not a sound .lprompt.safetensors file, or none at all."""

    exit_code = 3


class MismatchError(ConceptZapError):
    """A sound file that does not fit this base."""

    exit_code = 4


class ResourceError(ConceptZapError):
    """Memory, disk, device, or a base that is not there."""

    exit_code = 5


class RefusedError(ConceptZapError):
    """It could not be verified as erased, so nothing was drawn."""

    exit_code = 6


class SilentEditError(RefusedError):
    """An edit was attached and then not called: whatever was drawn meanwhile was not erased."""


class ThresholdError(ConceptZapError):
    """`made` is what was written all the same."""

    exit_code = 7
    made: object = None


class Interrupted(ConceptZapError):
    """Stopped by a signal with the state saved; `signum` 2 gives exit code 130, 15 gives 143."""

    def __init__(self, message: str, hint: str = "", signum: int = 2) -> None:
        super().__init__(message, hint)
        self.exit_code = 128 + signum


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, in the words of Python, of CUDA or of the CPU's allocator."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))


def escape(text: object) -> str:
    """One printable line of at most 200 characters, without control, format or bidi characters."""
    spaced = " ".join(str(text).split())
    kept = "".join(c for c in spaced if not unicodedata.category(c).startswith("C"))
    return kept if len(kept) <= LONGEST_SHOWN else kept[: LONGEST_SHOWN - 1] + "…"
