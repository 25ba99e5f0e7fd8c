"""From an exception to one line (or one JSON object) and an exit code."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import traceback
from dataclasses import dataclass
from typing import Any

from typer import Abort, Exit, TyperException

from conceptzap.errors import (
    ConceptZapError,
    Interrupted,
    ResourceError,
    UsageError,
    ran_out_of_memory,
)
from conceptzap.terminal import speech
from conceptzap.terminal.speech import one_line

SIGINT_CODE, SIGTERM_CODE, SIGPIPE_CODE = 130, 143, 141
# options of other programs -> ours, the first that the command has
CALLED = {
    **dict.fromkeys(("--cfg", "--cfg-scale", "--guidance-scale", "--scale"), ("--guidance",)),
    **dict.fromkeys(("--negative-prompt", "--neg-prompt", "--uc"), ("--negative",)),
    **dict.fromkeys(("-n", "--num-images", "--num-images-per-prompt", "--n-samples"), ("--count",)),
    **dict.fromkeys(("--num-inference-steps", "--iterations", "--max-train-steps"), ("--steps",)),
    **dict.fromkeys(("--model", "--model-id", "--ckpt", "--checkpoint", "-m"), ("--base",)),
    **dict.fromkeys(("--lora", "--erasure", "--lprompt"), ("--with",)),
    **dict.fromkeys(("--scheduler", "--sampling-method"), ("--sampler",)),
    **dict.fromkeys(("--preserve", "--retain"), ("--keep",)),
    **dict.fromkeys(("--target", "--mapping-concept", "--replace"), ("--anchor",)),
    **dict.fromkeys(("--out", "--outdir", "--output-dir", "--save-path"), ("--output",)),
    **dict.fromkeys(("--batch-size", "--train-batch-size"), ("--batch", "--set")),
    **dict.fromkeys(("--resolution", "-W", "-H"), ("--size",)),
    **dict.fromkeys(("--learning-rate", "--lr", "--rank"), ("--set",)),
}
NUMBERS = re.compile(r"Input should be a valid (integer|number)\b.*")  # how typer says it
OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Reply:
    """How errors are answered: for people on stderr, or with --json as one object on stdout."""

    as_json: bool
    debug: bool
    command: str = "conceptzap"  # whose help is pointed at where the parser does not say it

    def to(self, error: BaseException) -> int:
        """Print the answer to `error` and return the exit code."""
        speech.settle()
        if isinstance(error, BrokenPipeError) or _typer_saw_a_broken_pipe(error):
            # nobody reads any more; keep the interpreter's last flush from saying so
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return SIGPIPE_CODE
        if isinstance(error, SystemExit) and not error.code:  # how completion ends
            return 0
        answer = known(error, self.command)
        if self.debug:
            traceback.print_exception(error)
        if self.as_json:
            print(json.dumps({"error": record(answer)}), flush=True)
        else:
            print(line(answer), file=sys.stderr, flush=True)
        return answer.exit_code


def _typer_saw_a_broken_pipe(error: BaseException) -> bool:
    return isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)


class Bug(ConceptZapError):
    """Anything that was not raised on purpose."""


def known(error: BaseException, command: str = "conceptzap") -> ConceptZapError:
    """The `ConceptZapError` that says what `error` means for whoever typed the command."""
    if isinstance(error, ConceptZapError):
        return error
    if isinstance(error, TyperException):
        return _usage(error, command)
    if isinstance(error, (KeyboardInterrupt, Abort)):
        return Interrupted("interrupted", "nothing was left half-written")
    if isinstance(error, SystemExit) and error.code == SIGTERM_CODE:
        return Interrupted("terminated", "nothing was left half-written", signum=15)
    if ran_out_of_memory(error):
        hint = "use a smaller batch (--batch, or --set batch= of erase), --dtype float16 or another base"
        return ResourceError("out of memory", hint)
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        where = f": {error.filename}" if error.filename else ""
        return ResourceError(f"{error.strerror}{where}", "make room or get the rights, then run it again")
    return Bug(
        f"this is a bug in conceptzap: {type(error).__name__}: {error}",
        "please report it with what `conceptzap --debug ...` and `conceptzap doctor` print",
    )


def _usage(error: TyperException, command: str) -> UsageError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else command
    text, hint = NUMBERS.sub(_number, error.format_message().rstrip(".")), f"try `{command} --help`"
    if context and (ours := _ours(getattr(error, "option_name", ""), context)):
        text, hint = text.partition(". ")[0].partition(" (")[0], f"did you mean {ours}?"
    return UsageError(text, hint)


def _number(found: re.Match[str]) -> str:
    return "not a whole number" if found[1] == "integer" else "not a number"


def _ours(theirs: str, context: Any) -> str:
    """What this command calls an option that other programs have."""
    known = {option for param in context.command.params for option in param.opts}
    return next((name for name in CALLED.get(theirs, ()) if name in known), "")


def record(error: ConceptZapError) -> dict[str, object]:
    return {
        "code": error.exit_code,
        "kind": error.kind,
        "message": one_line(str(error)),
        "hint": one_line(error.hint),
    }


def line(error: ConceptZapError) -> str:
    """`error: what; how to mend it`."""
    text = f"error: {error}; {error.hint}" if error.hint else f"error: {error}"
    return one_line(text)


def among(errors: list[ConceptZapError]) -> dict[str, object]:
    """What JSON says of the bad ones among several: the first as `error`, all as `errors`."""
    records = [record(error) for error in errors]
    return {"error": records[0], "errors": records} if records else {}


def leave(errors: list[ConceptZapError], as_json: bool) -> None:
    """Report the bad ones among several and exit with the first one's code."""
    for error in errors:
        if not as_json:
            print(line(error), file=sys.stderr, flush=True)
    if errors:
        raise Exit(errors[0].exit_code)
