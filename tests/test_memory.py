"""What fits: rows of a call, halved chunks, recomputed activations that give the same gradients."""

from __future__ import annotations

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from edits import hooks

from conceptzap.base import Base
from conceptzap.errors import ResourceError
from conceptzap.report import Report
from conceptzap.runtime.attach import attached
from conceptzap.testing import tiny
from conceptzap.training import memory, objectives

GIB = 2**30


class Scarce:
    """Work for which memory runs out with more than `most` items at a time."""

    def __init__(self, most: int) -> None:
        self.most, self.tried = most, []

    def __call__(self, chunk: slice) -> list[int]:
        self.tried.append(chunk.stop - chunk.start)
        if self.tried[-1] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return list(range(chunk.start, chunk.stop))


@pytest.mark.parametrize(
    ("most", "tried"),
    [(8, [8, 3]), (4, [8, 4, 4, 3]), (3, [8, 4, 2, 2, 2, 2, 2, 1]), (1, [8, 4, 2] + [1] * 11)],
)
def test_chunks_are_halved_where_memory_runs_out(most: int, tried: list[int]) -> None:
    work = Scarce(most)
    assert sum(memory.in_chunks(11, 8, work), []) == list(range(11))
    assert work.tried == tried


def test_what_does_not_fit_one_by_one_is_an_error_with_sizes() -> None:
    with pytest.raises(ResourceError, match="one picture at a time: 2.00 GiB asked for") as error:
        list(memory.in_chunks(3, 2, Scarce(0)))
    assert error.value.exit_code == 5


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    def work(chunk: slice) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        list(memory.in_chunks(3, 2, work))


def test_a_small_base_never_notices_and_a_large_one_is_sampled_in_few_rows(
    sd1: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: GIB // 8)
    assert memory.rows_that_fit(sd1, 48) == 48
    large = tiny("sd1")
    shape = {"block_out_channels": (320, 640), "sample_size": 128}
    object.__setattr__(large.unet, "_internal_dict", FrozenDict({**sd1.unet.config, **shape}))
    assert memory.rows_that_fit(large, 48) == 1
    monkeypatch.setattr(memory, "free_bytes", lambda: 80 * GIB)
    assert 2 <= memory.rows_that_fit(large, 48) <= 8


def test_trajectories_do_not_depend_on_how_many_are_sampled_together(
    sd1: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (sd1, ["a cat", "a dog", "a house"], 5, Report())
    monkeypatch.setattr(objectives, "DENOISING", 3)
    whole, times = objectives.partial_sampling(*asked)
    monkeypatch.setattr(memory, "rows_that_fit", lambda base, most: 2)
    single, same_times = objectives.partial_sampling(*asked)
    assert whole.shape == (3, 3, *sd1.latent_shape) and whole.device.type == "cpu"
    assert torch.equal(times, same_times) and times.tolist() == sorted(times.tolist())[::-1]
    assert torch.allclose(whole, single, atol=1e-4)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_recomputed_activations_give_the_same_gradients(family: str) -> None:
    base = tiny(family)
    edits = [
        *objectives.low_rank(base, "unet.*.attn2.to_*", 2, seed=0),
        objectives.prompt(base, "a dog", 2, "inmidout", 0),
    ]
    params = objectives.parameters(edits)
    for parameter in params.values():
        parameter.data += 0.01
    cond, x = base.encode(["a cat", "a house"]), base.noise([0, 1])

    def gradients() -> list[torch.Tensor]:
        with attached(base.unet, edits):
            loss = base.eps(x, 500, cond).square().mean()
            return list(torch.autograd.grad(loss, list(params.values())))

    kept, calls = gradients(), []
    resnet = base.unet.mid_block.resnets[1]
    counting = resnet.register_forward_pre_hook(lambda *_: calls.append(1))
    with memory.recomputing(base):
        assert base.unet.is_gradient_checkpointing
        again = gradients()
    counting.remove()
    assert not base.unet.is_gradient_checkpointing and len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert all(g.abs().sum() > 0 for g in kept) and hooks(base) == 0
