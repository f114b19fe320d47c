"""One token instead of many equal ones, in Stable Diffusion 3's attention.

Where T5 is left out, the pipeline conditions the network on 256 tokens of zeros. They have no
positions, so they stay equal in every block: one of them, counted 256 times, gives the same result.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class CountedPadding:
    """The attention of Stable Diffusion 3, whose last token counts as many.

    Equals diffusers' `JointAttnProcessor2_0` on a prompt that ends in as many equal tokens, in
    values and in gradients, but for rounding.

    Args:
        count: How many tokens the last one stands for.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **_: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the attention's result for the image, (B, N, D), and for the prompt, (B, L, D).

        Args:
            attn: diffusers' `Attention`.
            hidden_states: Of the image, (B, N, D).
            encoder_hidden_states: Of the prompt, (B, L, D); None for a layer of the image alone,
                which has no padding.
        """
        # 1. Queries, keys and values, (B, heads, N, width of a head).
        image = [
            _heads(layer(hidden_states), attn.heads, norm)
            for layer, norm in (
                (attn.to_q, attn.norm_q),
                (attn.to_k, attn.norm_k),
                (attn.to_v, None),
            )
        ]
        if encoder_hidden_states is None:
            alone = scaled_dot_product_attention(*image).transpose(1, 2).flatten(-2)
            return attn.to_out[1](attn.to_out[0](alone))
        prompt = [
            _heads(layer(encoder_hidden_states), attn.heads, norm)
            for layer, norm in (
                (attn.add_q_proj, attn.norm_added_q),
                (attn.add_k_proj, attn.norm_added_k),
                (attn.add_v_proj, None),
            )
        ]
        query, key, value = (torch.cat(both, dim=2) for both in zip(image, prompt, strict=True))
        # 2. The weights are exponentials of the scores, so a summand on a score is a factor on its
        #    weight: log n makes one token weigh as much as n.
        counts = query.new_zeros(key.shape[2])
        counts[-1] = math.log(self.count)
        joined = scaled_dot_product_attention(query, key, value, attn_mask=counts[None])
        joined = joined.transpose(1, 2).flatten(-2)
        # 3. Apart again. The last block needs no prompt any more.
        length = hidden_states.shape[1]
        drawn, read = joined[:, :length], joined[:, length:]
        drawn = attn.to_out[1](attn.to_out[0](drawn))
        return drawn, read if attn.context_pre_only else attn.to_add_out(read)


def _heads(tokens: Tensor, heads: int, norm: Any) -> Tensor:
    """Return tokens (B, N, D) as (B, heads, N, D / heads), normalised where the model does so."""
    apart = tokens.unflatten(-1, (heads, -1)).transpose(1, 2)
    return apart if norm is None else norm(apart)
