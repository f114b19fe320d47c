"""One counted token against as many equal ones, by diffusers' own attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor
from transformers import CLIPTokenizer

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.models.families import open_model
from alignprop_cli.models.padding import CountedPadding
from tests.flow_models import small_sd3

WIDTH, COUNT = 32, 256


def attention(*, qk_norm: str | None, context_pre_only: bool) -> Attention:
    """Return the attention of Stable Diffusion 3 with random weights, float64."""
    torch.manual_seed(0)
    made = Attention(
        query_dim=WIDTH,
        added_kv_proj_dim=WIDTH,
        dim_head=8,
        heads=4,
        out_dim=WIDTH,
        context_pre_only=context_pre_only,
        bias=True,
        qk_norm=qk_norm,
        eps=1e-6,
        processor=JointAttnProcessor2_0(),
    )
    return made.double()


def run(layer: Attention, image: Tensor, prompt: Tensor, words: int) -> list[Tensor]:
    """Return the outputs for image and words, and the gradients of every weight and input."""
    image, prompt = image.clone().requires_grad_(), prompt.clone().requires_grad_()
    layer.zero_grad()
    drawn, read = layer(hidden_states=image, encoder_hidden_states=prompt)
    # The words alone: of the padding nothing is used, as no token of it reaches the image again.
    read = read[:, :words]
    weights = torch.linspace(-1.0, 1.0, drawn.numel(), dtype=torch.float64)
    loss = (drawn.flatten() * weights).sum() + read.square().sum()
    loss.backward()
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    assert image.grad is not None
    assert prompt.grad is not None
    return [drawn, read, *gradients, image.grad, prompt.grad[:, :words]]


@pytest.mark.parametrize("context_pre_only", [False, True])
@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_one_token_counted_256_times_is_256_equal_tokens(
    qk_norm: str | None, context_pre_only: bool
) -> None:
    layer = attention(qk_norm=qk_norm, context_pre_only=context_pre_only)
    image = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    words = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    # Not zero: behind the first layer the padding is some vector, the same for all its tokens.
    padding = torch.randn(2, 1, WIDTH, dtype=torch.float64)
    expected = run(layer, image, torch.cat([words, padding.expand(-1, COUNT, -1)], dim=1), 5)
    layer.set_processor(CountedPadding(COUNT))
    found = run(layer, image, torch.cat([words, padding], dim=1), 5)
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    # The number matters: as a single token the padding has another weight.
    layer.set_processor(CountedPadding(1))
    single = run(layer, image, torch.cat([words, padding], dim=1), 5)
    assert (single[0] - expected[0]).abs().max() > 1e-3


def test_a_layer_of_the_image_alone_is_as_before() -> None:
    layer = attention(qk_norm="rms_norm", context_pre_only=True)
    image = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    expected = layer(hidden_states=image)
    layer.set_processor(CountedPadding(COUNT))
    torch.testing.assert_close(layer(hidden_states=image), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "t5", "padding"),
    [(8, False, 1), (32, False, 256), (8, True, 256)],
    ids=["16 patches", "256 patches", "with T5"],
)
def test_padding_is_counted_where_most_tokens_are_padding(
    tmp_path: Path, size: int, t5: bool, padding: int
) -> None:
    folder = small_sd3(tmp_path / "model", t5=t5, sample_size=size, pos_embed_max_size=size)
    model = open_model(ModelConfig(id=str(folder), dtype="float32"), ["a cat"], torch.device("cpu"))
    embeds = model.conditioning(["a cat"], None).text.tensors["hidden"]
    words = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer").model_max_length
    assert embeds.shape[1] == words + padding
    counted = [
        processor.count
        for processor in model.network.module.attn_processors.values()
        if isinstance(processor, CountedPadding)
    ]
    assert counted == ([256] * len(model.network.module.attn_processors) if padding == 1 else [])
