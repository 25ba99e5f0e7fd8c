"""The hub, played by a folder: what is asked of it, and what is said when it does not answer."""

from __future__ import annotations

import fnmatch
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from refusals import edit_json, refusal

from conceptzap.base import hub, load_base
from conceptzap.errors import MismatchError, ResourceError
from conceptzap.testing import save_tiny, tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
EXTRAS = [
    "README.md",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "safety_checker/model.safetensors",
    "text_encoder/pytorch_model.bin",
]


class Hub:
    """A repository that serves `folder`, keeps account of the asked files, and may be closed."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache / "models--someone--tiny"
        self.fetched: list[str] = []
        self.failure: Exception | None = None
        self.revision: str | None = None

    def names(self) -> list[str]:
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in files)

    def model_info(self, repo: str, revision: str | None, timeout: float) -> SimpleNamespace:
        if self.failure:
            raise self.failure
        self.revision = revision
        files = [SimpleNamespace(rfilename=name) for name in self.names()]
        return SimpleNamespace(sha=COMMIT, siblings=files)

    def hf_hub_download(self, repo: str, name: str, revision: str) -> str:
        return str(self.folder / name)

    def snapshot_download(self, repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        """Like the client: files under the commit, and the branch's commit beside them."""
        snapshot, branch = self.cache / "snapshots" / COMMIT, revision or "main"
        if branch != COMMIT:
            (self.cache / "refs").mkdir(parents=True, exist_ok=True)
            (self.cache / "refs" / branch).write_text(COMMIT)
        for name in self.names():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                self.fetched.append(name)
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.folder / name, snapshot / name)
        return str(snapshot)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    folder = save_tiny(tmp_path / "repository")
    for name in EXTRAS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"never to be read")
    played = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr(hub, "HfApi", lambda: played)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "hf_hub_download", played.hf_hub_download)
    monkeypatch.setattr(hub, "snapshot_download", played.snapshot_download)
    return played


def test_only_what_is_needed_is_fetched(served: Hub) -> None:
    base = load_base("someone/tiny@v1", device="cpu")
    assert (base.id, base.revision) == ("someone/tiny", COMMIT)
    assert served.revision == "v1"
    assert base.signature == tiny("sd1").signature
    assert not set(served.fetched) & set(EXTRAS)
    assert sum(name.endswith(".safetensors") for name in served.fetched) == 3


@pytest.mark.parametrize("revision", ["", "@v1", f"@{COMMIT}"])
def test_what_was_fetched_once_works_offline(served: Hub, revision: str) -> None:
    """By branch, tag and commit, although the cache lacks what is never asked for."""
    load_base(f"someone/tiny{revision}", device="cpu")
    served.failure = OSError("no route to host")
    for name in {f"someone/tiny{revision}", f"someone/tiny@{COMMIT}"}:
        base = load_base(name, device="cpu")
        assert (base.id, base.revision) == ("someone/tiny", COMMIT)
    assert "not in the cache" in str(refusal(ResourceError, "someone/tiny@v2"))


def test_pickles_are_not_fetched(served: Hub) -> None:
    for path in (served.folder / "unet").glob("*.safetensors"):
        path.unlink()
    assert "pickle" in str(refusal(ResourceError, "someone/tiny"))
    assert served.fetched == []


def test_other_architectures_are_refused_before_they_are_fetched(served: Hub) -> None:
    edit_json(
        served.folder / "model_index.json", _class_name="FluxPipeline", transformer=["d", "F"]
    )
    assert "no cross-attention" in str(refusal(MismatchError, "someone/flux"))
    assert served.fetched == []


def test_no_such_repository(served: Hub) -> None:
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    served.failure = RepositoryNotFoundError("404", response=response)
    assert "the hub has no someone/else" in str(refusal(ResourceError, "someone/else"))


def test_repository_without_a_checkpoint(served: Hub) -> None:
    (served.folder / "model_index.json").unlink()
    assert "no diffusers checkpoint" in str(refusal(ResourceError, "someone/notes"))


def test_offline_is_one_line_at_once() -> None:
    start = time.monotonic()
    error = refusal(ResourceError, "someone/tiny@main")
    assert "cannot be reached" in str(error) and error.exit_code == 5
    assert time.monotonic() - start < 20  # the client alone would retry for half a minute
