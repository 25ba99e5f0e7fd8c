"""What a training leaves beside its file when asked: loss curves for a tracker, samples along the way."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conceptzap.edit import Json
from conceptzap.errors import ResourceError, UsageError, escape
from conceptzap.registry import family

if TYPE_CHECKING:
    import numpy as np

    from conceptzap.training.train import Event

JSONL = "jsonl"
# tracker -> the package that it writes with
PACKAGES = {JSONL: "json", "tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
PROJECT = "conceptzap"
Sample = Callable[[], "np.ndarray"]


def check(names: Sequence[str]) -> tuple[str, ...]:
    """The trackers' names, each once; `UsageError` for one that is unknown or not installed."""
    for name in names:
        if name not in PACKAGES:
            raise UsageError(f"no tracker is called {escape(name)!r}", family.suggest(name, PACKAGES))
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UsageError(f"{name} is not installed", f"pip install {name}, or --log-with {JSONL}")
    return tuple(dict.fromkeys(names))


class Lines:
    """A tracker that appends a JSON object a step to `metrics.jsonl`; called like accelerate's."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"

    def start(self) -> None:
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - until `finish`

    def store_init_configuration(self, values: Mapping[str, Json]) -> None:
        self._write({"config": dict(values)})

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        self._write({"step": step, **values})

    def log_images(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """They lie beside as files."""

    def finish(self) -> None:
        self.file.close()

    def _write(self, record: Mapping[str, Json]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


class Log:
    """Follows trainings: each step's losses to the trackers, every `every` steps a sample.

    All of it goes into `folder`, which is made when something does. Use it as a context.
    """

    def __init__(self, folder: Path, names: Sequence[str], every: int, config: Mapping[str, Json]) -> None:
        self.folder, self.names, self.every, self.config = folder, names, every, config
        self.trackers: list[Any] = []
        self.trainings = 0
        self.stack = ExitStack()

    def __enter__(self) -> Log:
        if self.names or self.every:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                message = f"cannot make {escape(self.folder)}: {error.strerror}"
                raise ResourceError(message, "make room or get the rights") from error
        for name in self.names:
            tracker = Lines(self.folder) if name == JSONL else _tracker(name, self.folder)
            tracker.start()
            self.stack.callback(tracker.finish)
            tracker.store_init_configuration(self._settings())
            self.trackers.append(tracker)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _settings(self) -> dict[str, Any]:
        """The plan without its nesting: numbers and texts, as all trackers take them."""
        config: Any = self.config.get("config")
        flat = {**self.config, **(config if isinstance(config, dict) else {})}
        for name in ("config", "output"):  # the first is flat now, the second a path of this machine
            flat.pop(name, None)
        return {
            key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
            for key, value in flat.items()
        }

    def follow(self, events: Iterable[Event], sample: Sample | None) -> Iterator[Event]:
        """Pass a training's events on; its losses are called by its number, where it is not the first."""
        self.trainings += 1
        of = f"{self.trainings}/" if self.trainings > 1 else ""
        for event in events:
            values = {f"{of}{name}": value for name, value in event.terms.items()}
            for tracker in self.trackers:
                tracker.log(values, step=event.step)
            if sample is not None and self.every and event.step % self.every == 0:
                self._keep(sample(), event.step, of)
            yield event

    def _keep(self, picture: np.ndarray, step: int, of: str) -> None:
        """A sheet [h, w, 3] uint8 as a file, and to the trackers that show pictures."""
        from conceptzap.format.pictures import save_png

        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        name = f"{of.replace('/', '-')}{step:06}.png"
        save_png(folder / name, picture, {"title": f"step {step}"}, force=True)
        for tracker in self.trackers:
            # TensorBoard is told the order of the axes, and takes a batch
            more = {"dataformats": "NHWC"} if getattr(tracker, "name", "") == "tensorboard" else {}
            if hasattr(tracker, "log_images"):
                tracker.log_images({f"{of}samples": picture[None]}, step=step, **more)


def _tracker(name: str, folder: Path) -> Any:
    """One of accelerate's, which writes below `folder` where it writes files."""
    from accelerate import tracking

    cls = tracking.LOGGER_TYPE_TO_CLASS[name]
    return cls(PROJECT, logging_dir=folder) if cls.requires_logging_directory else cls(PROJECT)
