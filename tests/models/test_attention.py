"""Attention with narrow heads: the numbers of torch's own, its gradient, its operations."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn.functional import scaled_dot_product_attention

from alignprop_cli.memory import SavedBytes, count
from alignprop_cli.models.attention import NarrowAttention, attend
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


@pytest.mark.parametrize("context", [None, randn(4, 2, 5, 12, dtype=torch.float32)])
@pytest.mark.parametrize("heads", [2, 1])
def test_a_layer_answers_as_with_the_processor_of_diffusers(
    context: torch.Tensor | None, heads: int
) -> None:
    """Heads of 8 channels, which are widened, and of 16, which are not."""
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
