"""The extension of webui and Forge, on stubs of what its script imports from them.

webui's UNet is the stand-in's, with cross-attention that passes over masks, as its xformers does; Forge's
patcher is the stand-in's. How they call a script is theirs: process, before every sampling, after a batch.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import edits as some
import pytest
import standin
import test_comfyui as comfyui
import torch
from torch import Tensor

from conceptzap import format
from conceptzap.base import Base, original
from conceptzap.errors import FormatError, RefusedError, SilentEditError, UsageError
from conceptzap.integrations import webui

base = comfyui.base
SCRIPT = Path(webui.__file__).parent / "scripts" / "conceptzap_erase.py"
NAME = "vg.lprompt.safetensors"


@dataclass
class Processing:
    sd_model: Any
    extra_generation_params: dict[str, str] = field(default_factory=dict)
    comments: list[str] = field(default_factory=list)

    def comment(self, text: str) -> None:
        self.comments.append(text)


class Blind(standin.CrossAttention):
    """Cross-attention that takes a mask and passes over it."""

    def forward(self, x: Any, context: Any = None, value: Any = None, mask: Any = None) -> Tensor:
        return super().forward(x, context)


@dataclass
class Place:
    """A program with the extension: its model, how it samples, and the script."""

    script: Any
    options: dict[str, Any]
    patcher: Any
    processing: Callable[[], Processing]
    base: Base

    def draw(self, prompt: str, names: Any = (), strength: float = 1.0) -> tuple[Tensor, Processing]:
        """One batch, the callbacks in their order."""
        p = self.processing()
        self.script.process(p, list(names), strength)
        self.script.process_before_every_sampling(p, list(names), strength, x=None)
        forge = getattr(p.sd_model, "forge_objects", None)
        model = comfyui.Program(forge.unet if forge else self.patcher, comfyui.stand_in_sample)
        found = comfyui.theirs(model, self.base, prompt)
        self.script.postprocess_batch(p, list(names), strength, images=[])
        return found, p


@pytest.fixture(params=["webui", "forge"])
def place(
    request: pytest.FixtureRequest, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    options: dict[str, Any] = {}
    script = _script(tmp_path, options, monkeypatch)
    unet = standin.UNet(comfyui.WIDTH, base.unet.config.cross_attention_dim).eval().requires_grad_(False)
    names = original.unet_names(base.unet)
    unet.load_state_dict({names[name]: value for name, value in base.unet.named_parameters()})
    patcher = standin.ModelPatcher(standin.Model(unet, base.alphas))
    if request.param == "webui":
        for name, module in unet.named_modules():
            if name.endswith("attn2"):
                module.__class__ = Blind

    def processing() -> Processing:  # Forge's objects are new for every sampling
        if request.param == "webui":
            return Processing(SimpleNamespace(model=SimpleNamespace(diffusion_model=unet)))
        return Processing(SimpleNamespace(forge_objects=SimpleNamespace(unet=patcher)))

    yield Place(script, options, patcher, processing, base)


def _script(models: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as the program loads it, with stubs for its modules."""
    made, settings = [], []
    gradio, modules = ModuleType("gradio"), ModuleType("modules")
    for name in ("Dropdown", "Slider"):
        setattr(gradio, name, lambda *given, **more: made.append((given, more)) or more["label"])
    gradio.Accordion = lambda *_, **__: nullcontext()
    modules.paths = SimpleNamespace(models_path=str(models))
    modules.scripts = SimpleNamespace(Script=object, AlwaysVisible=object())
    modules.script_callbacks = SimpleNamespace(on_ui_settings=settings.append)
    opts = SimpleNamespace(data=options, add_option=lambda name, info: options.setdefault(name, info[0]))
    modules.shared = SimpleNamespace(opts=opts, OptionInfo=lambda *given, **_: given)
    for name, module in (("gradio", gradio), ("modules", modules)):
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("conceptzap_erase", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    settings[0]()
    script = loaded.EraseScript()
    assert script.show(False) is modules.scripts.AlwaysVisible and script.title() == "Conceptzap"
    assert script.ui(False) == ["Erasures", "Strength"]
    return script


@pytest.fixture
def file(base: Base, tmp_path: Path) -> Path:
    (tmp_path / "lprompts").mkdir()
    path = tmp_path / "lprompts" / NAME
    format.save(some.erasure(base, some.eraser(base)), path)
    return path


def test_what_is_chosen_is_erased(place: Place, base: Base, file: Path) -> None:
    """By the gate of each row, and said in the infotext; afterwards nothing is left on the UNet."""
    assert webui.files(file.parents[1]) == [NAME]
    plain = {prompt: place.draw(prompt)[0] for prompt in (comfyui.PROMPT, comfyui.OTHER)}
    wanted = comfyui.ours(base, comfyui.PROMPT, some.eraser(base))
    found, p = place.draw(comfyui.PROMPT, [NAME])
    assert some.far(found, wanted) < comfyui.ROUNDING < some.far(plain[comfyui.PROMPT], wanted) / 100
    assert p.extra_generation_params["Erased"].startswith("Van Gogh:1 ")
    assert "erased in 4 rows" in p.comments[0]
    found, p = place.draw(comfyui.OTHER, [NAME])
    assert found.equal(plain[comfyui.OTHER]) and "nothing to erase" in p.comments[0]
    found, p = place.draw(comfyui.PROMPT)
    assert found.equal(plain[comfyui.PROMPT]) and not p.extra_generation_params and not p.comments
    hooks = [m for m in place.patcher.model.diffusion_model.modules() if m._forward_pre_hooks]
    assert not hooks and not any("forward" in vars(m) for m in place.patcher.model.diffusion_model.modules())


def test_strength(place: Place, base: Base, file: Path) -> None:
    half = tuple(edit.scaled(0.5) for edit in some.eraser(base))
    found, _ = place.draw(comfyui.PROMPT, [NAME], 0.5)
    assert some.far(found, comfyui.ours(base, comfyui.PROMPT, half)) < comfyui.ROUNDING
    assert place.draw(comfyui.PROMPT, [NAME], 0.0)[0].equal(place.draw(comfyui.PROMPT)[0])


def test_always_on(place: Place, base: Base, file: Path) -> None:
    """As the settings have it: whoever writes prompts can neither leave it out nor weaken it."""
    place.options["conceptzap_always"] = [NAME]
    wanted = comfyui.ours(base, comfyui.PROMPT, some.eraser(base))
    for names, strength in (((), 1.0), ((NAME,), 0.1)):
        assert some.far(place.draw(comfyui.PROMPT, names, strength)[0], wanted) < comfyui.ROUNDING


def test_a_batch_that_failed_leaves_nothing_behind(place: Place, base: Base, file: Path) -> None:
    plain, p = place.draw(comfyui.PROMPT)[0], place.processing()
    place.script.process(p, [NAME], 1.0)
    place.script.process_before_every_sampling(p, [NAME], 1.0)  # and then it was stopped
    assert place.draw(comfyui.PROMPT)[0].equal(plain)


def test_what_is_refused(place: Place, base: Base, file: Path) -> None:
    with pytest.raises(UsageError, match="no erasure 'x'"):
        place.draw(comfyui.PROMPT, ["x"])
    (file.parent / "bad.lprompt.safetensors").write_bytes(file.read_bytes()[:-4])
    with pytest.raises(FormatError):
        place.draw(comfyui.PROMPT, ["bad.lprompt.safetensors"])
    format.save(some.erasure(base, [some.guide(base)]), file.parent / "guide.lprompt.safetensors")
    with pytest.raises(RefusedError, match="guides"):
        place.draw(comfyui.PROMPT, ["guide.lprompt.safetensors"])


def test_a_unet_that_was_not_run_is_an_error(base: Base, file: Path, place: Place) -> None:
    p = place.processing()
    if hasattr(p.sd_model, "forge_objects"):
        return  # Forge's patcher is asked at every step
    place.script.process_before_every_sampling(p, [NAME], 1.0)
    with pytest.raises(SilentEditError, match="was not run with the edits"):
        place.script.postprocess_batch(p, [NAME], 1.0)
    assert torch.is_tensor(place.draw(comfyui.PROMPT)[0])
