"""What every use of the Hugging Face hub shares: the shape of names, patience, one line for what goes wrong.

The hub's client is imported when it is used.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from conceptzap.errors import ConceptZapError, ResourceError, escape

REPO = r"\w([\w.-]*\w)?/\w([\w.-]*\w)?"
LONGEST = 96  # characters of a repository's name
REVISION = r"[\w./-]+"
PATIENCE = 10  # seconds for the first answer
CLOSED = (401, 403)
LOGIN = "run: hf auth login"


def is_repo(name: str) -> bool:
    """Whether the hub can have a repository of this name."""
    odd = "--" in name or ".." in name or name.endswith(".git") or len(name) > LONGEST
    return not odd and bool(re.fullmatch(REPO, name, re.ASCII))


def is_answer(error: Exception) -> bool:
    """Whether the hub itself said no; all else is no network, in any of a dozen exceptions."""
    from huggingface_hub import errors

    said = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError)
    return isinstance(error, said) or _status(error) in CLOSED


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


@contextmanager
def answering(
    name: str, missing: type[ConceptZapError] = ResourceError, deed: str = "fetched"
) -> Iterator[None]:
    """Whatever the client raises about `name`, in one line: `missing` for what the hub does not have.

    `ResourceError` for what is closed, cannot be reached, or could not be `deed` for another reason.
    """
    from huggingface_hub import errors

    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    except ConceptZapError:
        raise
    except errors.GatedRepoError as error:
        hint = f"accept its terms on the hub and {LOGIN}"
        raise ResourceError(f"{name} is closed to you", hint) from error
    except errors.RepositoryNotFoundError as error:
        hint = f"check its spelling; if it is private, {LOGIN}"
        raise missing(f"the hub has no {name}", hint) from error
    except (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise missing(f"the hub has no {name}", "check its spelling and revision") from error
    except errors.LocalEntryNotFoundError as error:
        reason = "not in the cache, and the hub cannot be reached"
        raise ResourceError(f"{name} is {reason}", "give the path of a file here, or go online") from error
    except errors.OfflineModeIsEnabled as error:
        reason = "nothing may leave this machine (--offline or HF_HUB_OFFLINE)"
        raise ResourceError(f"{name} could not be {deed}: {reason}", "leave that out") from error
    except Exception as error:
        raise _failed(error, name, deed) from error
    finally:
        log.setLevel(level)


def _failed(error: Exception, name: str, deed: str) -> ResourceError:
    if _status(error) in CLOSED:
        return ResourceError(f"{name} is closed to you", f"get the right to it and {LOGIN}")
    return ResourceError(f"{name} could not be {deed}: {escape(error)}", "try again")
