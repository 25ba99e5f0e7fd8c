"""The verbs for files of erasures as they are: read, written, stacked, told of, pinned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conceptzap import edit, format
from conceptzap.edit import Erasure
from conceptzap.format import naming
from conceptzap.report import Bars, Report
from conceptzap.trust import admission
from conceptzap.trust.admission import Source
from conceptzap.verbs import inspecting, stacking
from conceptzap.verbs.stacking import Stacked

if TYPE_CHECKING:
    from conceptzap.trust.policy import Policy
    from conceptzap.verbs.generating import AnyBase
    from conceptzap.verbs.pushing import Pushed


inspect = format.read_header
examine = inspecting.examine
load = format.load


def save(erasure: Erasure, path: Path | str, force: bool = False) -> str:
    """Write an erasure, its name with the suffix; its digest.

    Raises `FormatError` for one that could not be read back, `UsageError` where the file exists.
    """
    return format.save(erasure, naming.erasure_path((), path), force)


def stack(items: Iterable[Source]) -> Erasure:
    """One erasure from several, whatever their order; paths are read. The same one counts once.

    Raises `MismatchError` when they are for different architectures or checkpoints.
    """
    return format.seal(edit.stack([admission.read(item) for item in items]))


def stack_files(
    paths: Sequence[Path | str],
    output: Path | str | None = None,
    force: bool = False,
    report: Report | None = None,
    base: AnyBase | None = None,
    elastic: bool = False,
) -> Stacked:
    """Write the stack of these files: by default here, called after all that it erases.

    What comes back has `overlaps`: concepts that several files erase, files that act on every prompt and,
    with a `base`, gates that open for the concept of another file. Warned of, as are keys alone.
    With `elastic`, which needs a `base`, what acts on every prompt gets a gate first: it acts as far as a
    prompt comes near its concepts. Raises as `stack` does, and `RefusedError` for what no gate can hold.
    """
    return stacking.write(paths, output, force, report or Bars(), base, elastic)


def cite(paths: Path | str | Sequence[Path | str], report: Report | None = None) -> dict[str, str]:
    """BibTeX of what made some files, by key: the papers of their methods, and conceptzap itself.

    Raises `FormatError` for what is no erasure; warns of a method that is not known here.
    """
    from conceptzap.verbs import citing

    return citing.cite(listed(paths), report or Bars())


def push(
    path: Path | str,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    licence: str = "",
    dry_run: bool = False,
    output: Path | str | None = None,
    force: bool = False,
    report: Report | None = None,
) -> Pushed:
    """Share an erasure in `repo` ("user/repo") of the Hugging Face hub, with its model card.

    What comes back has its `name` there, `hf://user/repo/file@commit`, which every verb takes for a path.
    Repository and branch (`revision`) are made where they are not there; `licence` is an identifier of
    the hub, "" for that of the base. With `dry_run` the card is written to the folder `output`, and
    nothing is pushed.

    Raises `FormatError` for what is no erasure, `UsageError` for names that nothing can have, a public
    repository where `private` is asked for, and another file of the same name (without `force`),
    `ResourceError` without a token, the right to write, or the hub.
    """
    from conceptzap.verbs import pushing

    return pushing.push(
        path, repo, private=private, revision=revision, message=message, licence=licence,
        dry_run=dry_run, output=output, force=force, report=report or Bars(),
    )  # fmt: skip


def lock(
    erasures: Path | str | Iterable[Path | str],
    output: Path | str = "conceptzap.lock",
    *,
    base: Path | str = "demo", prediction: str | None = None,
    attacked: Path | str | Iterable[Path | str] = (),
    fail_over: Iterable[str] = (),
    force: bool = False,
) -> Policy:  # fmt: skip
    """Write a policy that pins erasure files on a base: these files, this checkpoint, nothing less.

    `attacked`: results of `attack` on all of them together, pinned too, with no rate over `fail_over`,
    such as `["ASR=10"]`. Paths of files and of a base that is a folder or file are kept relative to the
    policy. Raises `UsageError` for an `output` that exists (unless `force`) or no files, `FormatError`
    for what is no erasure, `RefusedError` for keys, scaled and foreign erasures, rates over a limit.
    """
    from conceptzap.trust import guard

    rest = {"attacked": listed(attacked), "fail_over": fail_over}
    return guard.lock(listed(erasures), base, output, force=force, prediction=prediction, **rest)


def verify(path: Path | str = "conceptzap.lock", *, device: str = "auto") -> Policy:
    """The policy, once all of it holds here: version, files, the base's weights, every self-test.

    Raises `RefusedError` with every reason otherwise, `UsageError` for what is no policy.
    """
    from conceptzap.trust import guard

    return guard.verify(path, device)


def listed(given: Any) -> tuple[Any, ...]:
    """One thing or several, as several."""
    return (given,) if isinstance(given, (str, Path, Erasure)) else tuple(given)
