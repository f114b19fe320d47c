"""Attention whose heads have few channels, on the CPU.

Torch's fused kernel for the CPU loses time where a head has fewer than 16 channels: its products of
matrices are too narrow for the vector units. Zeros up to 16 change no number and are faster: for 8
channels and 1,024 places forward takes 0.76 and backward 0.58 of the time (one thread of an AMD
EPYC with AVX-512, torch 2.14). Published models have 40 channels and more; small ones, such as the
network of tests/benchmarks/step.py, do not.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.flop_counter import (
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

WIDTH = 16
"""Channels of a head from which on the kernel is used as it is."""

_ATEN = torch.ops.aten


class NarrowAttention:
    """Processor of diffusers' `Attention` layers as U-Nets have them: no mask, no norms within.

    The heads are narrow, the tensors on the CPU.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend from hidden_states (B, L, C) to themselves or to the text; returns (B, L, C)."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, L, channels)
            for layer in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        attended: Tensor = attend(query, key, value)[0]
        projection, dropout = attn.to_out
        return dropout(projection(attended.transpose(1, 2).flatten(2)))


def use_narrow_attention(network: Any) -> None:
    """Let the layers of a U-Net's transformers that have narrow heads attend by it, on the CPU."""
    for module in network.modules():
        if isinstance(module, Attention) and _is_plain(module):
            module.set_processor(NarrowAttention())


def _is_plain(layer: Attention) -> bool:
    """Return whether a layer has narrow heads and nothing that `NarrowAttention` leaves out."""
    parts = (layer.group_norm, layer.spatial_norm, layer.norm_q, layer.norm_k, layer.norm_cross)
    return (
        layer.inner_dim // layer.heads < WIDTH
        and not any(parts)
        and not layer.residual_connection
        and layer.rescale_output_factor == 1.0
    )


def _widen(tensor: Tensor) -> Tensor:
    return pad(tensor, (0, WIDTH - tensor.shape[-1]))


@torch.library.custom_op("alignprop::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attend with the heads widened by zeros.

    An operator of its own, so that autograd keeps the narrow tensors and only useful operations
    are counted.

    Args:
        query: Shape (B, heads, L, channels), on the CPU, fewer than 16 channels.
        key: Shape (B, heads, S, channels).
        value: Same shape as key.

    Returns:
        Shape (B, heads, L, channels), differentiable in all three, and what backward needs of the
        softmax.
    """
    scale = query.shape[-1] ** -0.5
    wide, logsumexp = _ATEN._scaled_dot_product_flash_attention_for_cpu(
        *map(_widen, (query, key, value)), scale=scale
    )
    return wide[..., : query.shape[-1]].contiguous(), logsumexp.contiguous()


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty((batch, heads, length), dtype=exact)


@torch.library.custom_op("alignprop::attend_backward", mutates_args=())
def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in query, key and value."""
    channels = query.shape[-1]
    gradients = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
        *map(_widen, (gradient, query, key, value, attended)),
        logsumexp,
        0.0,
        False,
        scale=channels**-0.5,
    )
    query_, key_, value_ = (wide[..., :channels].contiguous() for wide in gradients)
    return query_, key_, value_


@attend_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _back(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attend_backward(gradient, *ctx.saved_tensors)


attend.register_autograd(_back, setup_context=_keep)


@register_flop_formula(torch.ops.alignprop.attend)
def _(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


@register_flop_formula(torch.ops.alignprop.attend_backward)
def _(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)
