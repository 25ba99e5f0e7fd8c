"""Erase concepts from Stable Diffusion: a frozen checkpoint, one small file, no concept.

    import conceptzap

    made = conceptzap.erase("Van Gogh", anchors="painting")
    for picture in conceptzap.generate("a cat by Van Gogh", erasures=made.path):
        picture.save("cat.png")

Names load on first use, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names as below, for whoever reads types
    from conceptzap.api import applied as applied
    from conceptzap.api import apply as apply
    from conceptzap.api import attack as attack
    from conceptzap.api import bench as bench
    from conceptzap.api import cite as cite
    from conceptzap.api import compare as compare
    from conceptzap.api import demo_pipeline as demo_pipeline
    from conceptzap.api import erase as erase
    from conceptzap.api import erase_all as erase_all
    from conceptzap.api import evaluate as evaluate
    from conceptzap.api import examine as examine
    from conceptzap.api import export as export
    from conceptzap.api import generate as generate
    from conceptzap.api import harden as harden
    from conceptzap.api import import_ as import_
    from conceptzap.api import inspect as inspect
    from conceptzap.api import load as load
    from conceptzap.api import lock as lock
    from conceptzap.api import plan as plan
    from conceptzap.api import plan_all as plan_all
    from conceptzap.api import push as push
    from conceptzap.api import remove as remove
    from conceptzap.api import save as save
    from conceptzap.api import stack as stack
    from conceptzap.api import stack_files as stack_files
    from conceptzap.api import verify as verify
    from conceptzap.base import Base as Base
    from conceptzap.edit import Edit as Edit
    from conceptzap.edit import Erasure as Erasure
    from conceptzap.edit import Gate as Gate
    from conceptzap.edit import Header as Header
    from conceptzap.errors import ConceptZapError as ConceptZapError
    from conceptzap.errors import FormatError as FormatError
    from conceptzap.errors import Interrupted as Interrupted
    from conceptzap.errors import MismatchError as MismatchError
    from conceptzap.errors import RefusedError as RefusedError
    from conceptzap.errors import ResourceError as ResourceError
    from conceptzap.errors import SilentEditError as SilentEditError
    from conceptzap.errors import ThresholdError as ThresholdError
    from conceptzap.errors import UsageError as UsageError
    from conceptzap.evaluation.matrix import Bench as Bench
    from conceptzap.evaluation.run import Evaluation as Evaluation
    from conceptzap.format.lprompt import Info as Info
    from conceptzap.playground.serving import ui as ui
    from conceptzap.redteam.outcome import Attacked as Attacked
    from conceptzap.report import Bars as Bars
    from conceptzap.report import Report as Report
    from conceptzap.result import Result as Result
    from conceptzap.result import Score as Score
    from conceptzap.result import Settings as Settings
    from conceptzap.task import Task as Task
    from conceptzap.trust.policy import Policy as Policy
    from conceptzap.verbs.applying import Handle as Handle
    from conceptzap.verbs.erasing import ErasedFile as ErasedFile
    from conceptzap.verbs.exporting import Exported as Exported
    from conceptzap.verbs.generating import Picture as Picture
    from conceptzap.verbs.hardening import HardenedFile as HardenedFile
    from conceptzap.verbs.inspecting import Model as Model
    from conceptzap.verbs.many import ErasedAll as ErasedAll
    from conceptzap.verbs.pushing import Pushed as Pushed
    from conceptzap.verbs.stacking import Stacked as Stacked

__version__ = "0.1.0"

_HOMES = {
    "api": (
        "applied", "apply", "attack", "bench", "cite", "compare", "demo_pipeline", "erase", "erase_all",
        "evaluate", "examine", "export", "generate", "harden", "import_", "inspect", "load", "lock",
        "plan", "plan_all", "push", "remove", "save", "stack", "stack_files", "verify",
    ),
    "base": ("Base",),
    "edit": ("Edit", "Erasure", "Gate", "Header"),
    "errors": (
        "ConceptZapError", "FormatError", "Interrupted", "MismatchError", "RefusedError",
        "ResourceError", "SilentEditError", "ThresholdError", "UsageError",
    ),
    "evaluation.matrix": ("Bench",),
    "evaluation.run": ("Evaluation",),
    "format.lprompt": ("Info",),
    "playground.serving": ("ui",),
    "redteam.outcome": ("Attacked",),
    "report": ("Bars", "Report"),
    "result": ("Result", "Score", "Settings"),
    "task": ("Task",),
    "trust.policy": ("Policy",),
    "verbs.applying": ("Handle",),
    "verbs.erasing": ("ErasedFile",),
    "verbs.exporting": ("Exported",),
    "verbs.generating": ("Picture",),
    "verbs.hardening": ("HardenedFile",),
    "verbs.inspecting": ("Model",),
    "verbs.many": ("ErasedAll",),
    "verbs.pushing": ("Pushed",),
    "verbs.stacking": ("Stacked",),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted([*_HOME, "__version__"])

if not TYPE_CHECKING:  # a type checker would believe every name to be there

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
