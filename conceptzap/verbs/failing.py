"""What went wrong with one of many things, as it is kept and told; the others go on."""

from __future__ import annotations

from conceptzap.edit import Json
from conceptzap.errors import ConceptZapError, Interrupted, escape, ran_out_of_memory


def record(error: Exception, hint: str) -> dict[str, Json]:
    """An error as a record; `hint` is of one that was not raised on purpose. What stops all is raised."""
    if isinstance(error, Interrupted):
        raise error
    kind, code = type(error).__name__, 1
    if isinstance(error, ConceptZapError):
        code, hint = error.exit_code, error.hint
    elif ran_out_of_memory(error):
        from conceptzap.training import memory

        code, hint = 5, "use a smaller batch or a smaller checkpoint"
        memory.release()
    return {"code": code, "kind": kind, "message": escape(error) or kind, "hint": escape(hint)}
