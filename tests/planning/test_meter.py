"""What is counted on the meta device is what a real run keeps."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from alignprop_cli.lora import layers as lora
from alignprop_cli.planning import meter as memory
from tests.factories import small_unet

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@functools.cache
def network(device: str) -> Any:
    """Return a small UNet with a LoRA; what a test leaves in it, the next one takes away."""
    unet = small_unet()
    lora.inject(unet, rank=4, alpha=4, target_modules=TARGETS, seed=0)
    return unet.to(device)


def network_call(device: str, level: str, batch: int, *, has_grad: bool) -> tuple[Any, list[Any]]:
    """Return one call of a small UNet with a LoRA, and what is there anyway."""
    unet = network(device)
    unet.zero_grad()
    unet.disable_gradient_checkpointing()
    if level == "block":
        unet.enable_gradient_checkpointing()
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    channels = unet.config.in_channels
    latents = torch.zeros(batch, channels, size, size, device=device, requires_grad=has_grad)
    embeds = torch.zeros(batch, 9, width, device=device)

    def call(latents: Tensor) -> Tensor:
        timesteps = torch.full((batch,), 3.0, device=device)
        return unet(latents, timesteps, embeds, return_dict=False)[0]

    def run() -> Tensor:
        if level == "call":
            return checkpoint(call, latents, use_reentrant=False, preserve_rng_state=False)
        return call(latents)

    return run, [*unet.parameters(), latents, embeds]


@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("level", ["none", "block", "call"])
def test_the_meta_device_counts_what_a_real_run_keeps(
    level: str, batch: int, has_grad: bool
) -> None:
    costs: list[memory.Cost] = []
    for device in ("cpu", "meta"):
        run, there = network_call(device, level, batch, has_grad=has_grad)
        costs.append(memory.count(run, exclude=there))
    real, predicted = costs
    assert predicted.saved == real.saved
    assert (predicted.saved > 0) == (level != "call")
    assert predicted.forward_flops == real.forward_flops > 0
    assert predicted.backward_flops == real.backward_flops > 0
    assert predicted.forward == pytest.approx(real.forward, rel=0.02)
    assert predicted.backward == pytest.approx(real.backward, rel=0.15)


def test_recomputing_keeps_less_and_computes_one_forward_more() -> None:
    costs: dict[str, memory.Cost] = {}
    for level in ("none", "block", "call"):
        run, there = network_call("meta", level, 2, has_grad=True)
        costs[level] = memory.count(run, exclude=there)
    none, block, call = (costs[level] for level in ("none", "block", "call"))
    assert none.saved > block.saved > call.saved
    assert none.forward > block.forward > call.forward
    extra = call.backward_flops - none.backward_flops
    # Recomputing stops at the last tensor that is needed, so it is not quite a whole forward.
    assert 0.95 * none.forward_flops < extra <= none.forward_flops
    assert none.backward_flops < block.backward_flops <= call.backward_flops


def test_a_counted_graph_is_freed_with_its_result() -> None:
    given = torch.zeros(8, requires_grad=True)
    with memory.SavedBytes() as kept:
        result = given.exp()  # keeps its own output for backward
    kept.release()
    output = weakref.ref(result)
    del result
    assert output() is None


def test_what_autograd_lets_go_is_not_counted_unless_it_is_held() -> None:
    given = torch.zeros(1000, requires_grad=True)

    def run() -> Tensor:
        given.sin().exp().detach()  # whose graph ends here
        return given.exp()

    with memory.SavedBytes() as kept:
        result = run()
    assert kept.total == 3 * 4000  # the input once, and two results
    with memory.SavedBytes([given], hold=False) as kept:
        result = run()
    assert kept.total == 4000
    del result
    assert kept.total == 0


def test_modules_that_count_several_times() -> None:
    """Five blocks of which one counts for three, against seven blocks."""

    def block() -> torch.nn.Sequential:
        linear = torch.nn.Linear
        return torch.nn.Sequential(linear(8, 64), torch.nn.GELU(), linear(64, 8))

    def costs(blocks: int, times: list[int]) -> memory.Cost:
        made = torch.nn.Sequential(*(block() for _ in range(blocks)))
        given = torch.zeros(16, 8, requires_grad=True)
        there = [*made.parameters(), given]
        return memory.count(
            lambda: made(given), exclude=there, times=dict(zip(made, times, strict=True))
        )

    assert costs(5, [1, 1, 3, 1, 1]) == costs(7, [1] * 7)
    assert costs(5, [1] * 5) != costs(7, [1] * 7)


def test_what_is_kept_is_counted_by_storage_and_without_what_was_there() -> None:
    weight = torch.ones(1000, requires_grad=True)
    given = torch.ones(1000)

    def run() -> Tensor:
        product = weight * given  # keeps both factors, which are there anyway
        squared = product.exp()  # keeps its result
        return squared.view(10, 100).exp().sum()  # keeps its result; the view is no new storage

    with memory.SavedBytes([weight, given]) as kept:
        run()
    assert kept.total == 2 * 4000
    with memory.SavedBytes() as kept:
        run()
    assert kept.total == 3 * 4000  # the product needs only the factor beside the weight


def test_live_bytes_rise_and_fall_with_the_tensors() -> None:
    with memory.Meter() as live:
        first = torch.zeros(250)
        assert live.now == 1000
        second = first + 1.0
        first.add_(1.0)
        assert live.now == 2000
        del second
        assert live.now == 1000
        assert live.peak == 2000
    del first
    assert live.now == 0


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_attention_on_the_meta_device_keeps_no_matrix(device_type: str) -> None:
    tokens = 512

    def attend(kernel: Callable[..., Tensor]) -> Tensor:
        query, key, value = (
            torch.zeros(1, 4, tokens, 16, device="meta", requires_grad=True) for _ in range(3)
        )
        return kernel(query, key, value)

    plain = memory.SavedBytes()
    with plain:
        attend(torch.nn.functional.scaled_dot_product_attention)
    fused = memory.count(
        lambda: attend(torch.nn.functional.scaled_dot_product_attention), device_type=device_type
    )
    matrix = 4 * tokens * tokens * 4
    assert plain.total > matrix
    assert fused.saved < matrix / 4
    # Two products of tokens x tokens x 16 for each of 4 heads, forward.
    assert fused.forward_flops == 2 * 2 * 4 * tokens * tokens * 16


@pytest.mark.parametrize("batch", [1, 2])
def test_operations_are_those_of_torchs_own_counter(batch: int) -> None:
    """By the plain attention, as torch has no formula for the CPU's kernel."""
    run, there = network_call("cpu", "none", batch, has_grad=True)
    cost = memory.count(run, exclude=there)
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        result = run()
        forward = counter.get_total_flops()
        result.backward(torch.ones_like(result))
    assert cost.forward_flops == forward
    # Going back, the kernel computes the attention matrix again: one product of five more.
    assert forward < counter.get_total_flops() - forward <= cost.backward_flops
    with (
        torch.no_grad(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        run()
    with torch.no_grad(), memory.Meter() as meter:
        run()
    assert meter.flops == counter.get_total_flops()


def peak_by_the_profiler(run: Callable[[], Tensor]) -> int:
    """Return the most bytes that torch's own allocator had given out at once, forward and back."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        result = run()
        result.backward(torch.empty_like(result))
    assert profiler.profiler is not None
    events: Any = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("level", ["none", "block", "call"])
def test_the_peak_is_that_of_torchs_profiler(level: str) -> None:
    run, there = network_call("cpu", level, 4, has_grad=True)
    cost = memory.count(run, exclude=there)
    for tensor in there:
        tensor.grad = None
    assert cost.backward == pytest.approx(peak_by_the_profiler(run), rel=0.05)
