"""Attention with narrow heads: the numbers of torch's own, its gradient, its operations."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn.functional import scaled_dot_product_attention

from alignprop_cli.models.attention import NarrowAttention, attend, use_narrow_attention
from alignprop_cli.planning.meter import SavedBytes, count
from tests.factories import randn

SHAPE = (2, 3, 7, 5)


def inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = (SHAPE, (2, 3, 9, 5), (2, 3, 9, 5))
    return [randn(i, *shape).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_beside_the_heads_change_no_number(dtype: torch.dtype) -> None:
    ours, plain = inputs(dtype), inputs(dtype)
    attended = attend(*ours)[0]
    expected = scaled_dot_product_attention(*plain)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert torch.allclose(attended, expected, rtol=0.0, atol=tolerance)
    weight = randn(9, *SHAPE).to(dtype)
    (attended * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert float(theirs.grad.norm()) > 0.1
        assert torch.allclose(mine.grad, theirs.grad, rtol=0.0, atol=10 * tolerance)


def test_the_gradient_is_that_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(lambda *t: attend(*t)[0], inputs())


def test_it_stores_and_counts_no_zeros() -> None:
    cost = count(lambda: attend(*inputs())[0])
    # Two products forward and five backward, each of 2 L S D operations for a head.
    product = 2 * 2 * 3 * 7 * 9 * 5
    assert (cost.forward_flops, cost.backward_flops) == (2 * product, 5 * product)
    given = inputs()
    with SavedBytes(given) as kept:
        attend(*given)
    # Beside its inputs: what it returns, and a number for each head and place.
    assert kept.total == 8 * (2 * 3 * 7 * 5 + 2 * 3 * 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_operator_keeps_its_promises_to_the_compiler(dtype: torch.dtype) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(attend, tuple(inputs(dtype)), test_utils=checks)


def test_a_layer_with_more_to_it_keeps_its_processor() -> None:
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        down_block_types=("AttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "AttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    latents, text = (
        randn(i, *s, dtype=torch.float32) for i, s in ((0, (1, 4, 8, 8)), (1, (1, 3, 8)))
    )
    with torch.no_grad():
        expected = network(latents, 1, text).sample
        use_narrow_attention(network)
        kinds = {type(layer) for layer in network.attn_processors.values()}
        assert kinds == {AttnProcessor2_0, NarrowAttention}
        assert torch.allclose(network(latents, 1, text).sample, expected, atol=1e-5)


@pytest.mark.parametrize("context", [None, randn(4, 2, 5, 12, dtype=torch.float32)])
@pytest.mark.parametrize("heads", [2, 4])
def test_a_layer_answers_as_with_the_processor_of_diffusers(
    context: torch.Tensor | None, heads: int
) -> None:
    """Heads of 8 and of 4 channels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = Attention(
            query_dim=16,
            cross_attention_dim=None if context is None else 12,
            heads=heads,
            dim_head=16 // heads,
            processor=AttnProcessor2_0(),
        )
    hidden = randn(3, 2, 9, 16, dtype=torch.float32)
    expected = layer(hidden, encoder_hidden_states=context)
    layer.set_processor(NarrowAttention())
    assert torch.allclose(layer(hidden, encoder_hidden_states=context), expected, atol=1e-6)
