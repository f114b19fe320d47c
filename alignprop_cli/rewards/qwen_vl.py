"""Qwen's image and language models (Qwen2-VL, 2.5 and 3), read differentiably: images are tensors.

What transformers' processor does to files is done to tensors here; the networks are transformers'.
An image comes first and a text follows, so in every prompt the image's tokens have the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, Qwen2VLConfig
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from alignprop_cli.errors import ConfigError
from alignprop_cli.hub import folder_or_id, loading
from alignprop_cli.images import CLIP_MEAN, CLIP_STD, normalise, resize
from alignprop_cli.rewards.base import without_autocast
from alignprop_cli.rewards.frozen import MetaReward

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""The models that are read, as `model_type` names them."""

# The largest quotient of an image's sides.
_LONGEST = 200


@dataclass(frozen=True)
class ImageRules:
    """How images become patches.

    Args:
        patch: Side of a patch in pixels.
        merge: Side, in patches, of the square that becomes one token.
        frames: Times that an image is repeated, as a film of equal frames.
        least: Fewest pixels; smaller images are made larger.
        most: Most pixels; larger images are made smaller.
        mean: By channel, of images in [0, 1].
        std: By channel.
    """

    patch: int
    merge: int
    frames: int
    least: int
    most: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def of(processor: Any, most: int | None = None) -> ImageRules:
        """Return those of an image processor of transformers, with fewer pixels if `most` is."""
        own = ImageRules(
            processor.patch_size,
            processor.merge_size,
            processor.temporal_patch_size,
            processor.size["shortest_edge"],
            processor.size["longest_edge"],
            tuple(processor.image_mean),
            tuple(processor.image_std),
        )
        return own.with_most(most)

    def with_most(self, most: int | None) -> ImageRules:
        """Return them with fewer pixels at most; None changes nothing."""
        most = self.most if most is None else min(most, self.most)
        return replace(self, most=most, least=min(self.least, most))


# Sizes of published networks, so that their memory can be estimated before a download.
TEXT_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
"""The language model of Qwen2-VL-7B and Qwen2.5-VL-7B."""

QWEN2_VL_7B = Qwen2VLConfig(text_config=TEXT_7B, vision_config={"hidden_size": 3584})

QWEN2_VL_RULES = ImageRules(14, 2, 2, 56 * 56, 28 * 28 * 16384, CLIP_MEAN, CLIP_STD)
"""Of the processors that are published with Qwen2-VL and 2.5."""


def patches(images: Tensor, rules: ImageRules) -> tuple[Tensor, tuple[int, int]]:
    """Resize images, normalise them and cut them into patches.

    Args:
        images: Shape (B, 3, H, W), in [0, 1].
        rules: Of the model.

    Returns:
        Patches, shape (B, h w, 3 frames patch patch), float32 at least, in the order of the tokens:
        squares of merge x merge patches, and inside a square by rows. Differentiable in images.
        And the rows h and columns w of patches.

    Raises:
        ConfigError: If the images are too long for their width.
    """
    # 1. Both sides a multiple of what becomes a token. The library refuses as long ones.
    side, merge = rules.patch, rules.merge
    height, width = images.shape[-2:]
    if max(height, width) > _LONGEST * min(height, width):
        raise ConfigError(
            f"an image of {width} x {height} pixels is too long for Qwen's models: one side may be "
            f"at most {_LONGEST} times the other"
        )
    target = smart_resize(
        height, width, factor=side * merge, min_pixels=rules.least, max_pixels=rules.most
    )
    seen = normalise(resize(images, cast(tuple[int, int], target)), rules.mean, rules.std)
    # 2. (B, 3, rows, merge, side, columns, merge, side) -> (B, tokens, 3, frames, side, side).
    rows, columns = target[0] // side, target[1] // side
    cut = seen.unflatten(3, (columns // merge, merge, side))
    cut = cut.unflatten(2, (rows // merge, merge, side)).permute(0, 2, 5, 3, 6, 1, 4, 7)
    cut = cut.reshape(len(images), rows * columns, 3, 1, side, side)
    return cut.expand(-1, -1, -1, rules.frames, -1, -1).flatten(2), (rows, columns)


@dataclass(frozen=True)
class Words:
    """A text for the model, in tokens, around the place of the image.

    Args:
        before: Tokens before the image, the same for every text.
        after: Tokens after it.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]

    @staticmethod
    def of(processor: Any, text: str) -> Words:
        """Return the tokens of a user's message of one image and a text, ready for the answer.

        Args:
            processor: Of transformers, with the model's chat template.
            text: The text.

        Raises:
            ValueError: If the template has no place for an image.
        """
        content = [{"type": "image"}, {"type": "text", "text": text}]
        message = [{"role": "user", "content": content}]
        whole = processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        tokens = list(processor.tokenizer(whole).input_ids)
        # The first one: a prompt may hold the word itself.
        place = tokens.index(processor.image_token_id)
        return Words(tuple(tokens[:place]), tuple(tokens[place + 1 :]))


def hidden_states(
    network: Any,
    images: Tensor,
    rules: ImageRules,
    texts: Sequence[Words],
    where: Sequence[int],
    *,
    dtype: torch.dtype,
    in_line: bool = False,
) -> Tensor:
    """Return the last hidden state of one token of each text, which follows its image.

    Args:
        network: Of one of `KINDS`, as transformers' `Qwen2VLModel` and the like.
        images: Shape (B, 3, H, W), in [0, 1].
        rules: Of the model.
        texts: B texts.
        where: For each the index of the token, among those after the image.
        dtype: Precision of the network.
        in_line: Whether the image's tokens count as a line of text, not as a square.

    Returns:
        Shape (B, D), precision of the network. Differentiable in images.
    """
    cut, grid = patches(images, rules)
    with without_autocast(images.device):
        tokens = (grid[0] // rules.merge, grid[1] // rules.merge)
        # 1. The image: n tokens (B, n, D), and for some models features for inner layers.
        seen, deep = _see(network.visual, cut.to(dtype), grid, rules.merge)
        # 2. Before, image, after. What comes after a text's end is seen by none of its tokens, so
        #    texts of different lengths need no mask. Any token fills the rest.
        longest = max(len(text.after) for text in texts)
        rows = [[*text.after, *[text.after[-1]] * (longest - len(text.after))] for text in texts]
        embed = network.get_input_embeddings()
        before, after = (
            embed(torch.tensor(ids, device=images.device))
            for ids in ([list(texts[0].before)] * len(images), rows)
        )
        whole = torch.cat([before, seen, after], dim=1)  # (B, L, D)
        # 3. The layers, and the token that was asked for.
        begin = before.shape[1]
        inner: dict[str, Any] = {}
        if deep:
            mask = torch.zeros(whole.shape[:2], dtype=torch.bool, device=images.device)
            mask[:, begin : begin + seen.shape[1]] = True
            inner = {"visual_pos_masks": mask, "deepstack_visual_embeds": deep}
        read = network.language_model(
            inputs_embeds=whole,
            position_ids=_in_line(whole) if in_line else _positions(begin, tokens, longest, whole),
            use_cache=False,
            **inner,
        ).last_hidden_state
        asked = torch.tensor(list(where), device=images.device) + begin + seen.shape[1]
        return read.gather(1, asked[:, None, None].expand(-1, 1, read.shape[2])).squeeze(1)


def _see(
    visual: Any, cut: Tensor, grid: tuple[int, int], merge: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the image's tokens (B, n, D), and the features for inner layers, (B n, D) each."""
    # The grid stays on the CPU, where the library reads it; what it makes of it goes to the device.
    grids = torch.tensor([[1, *grid]] * len(cut))
    given = {"position_ids": get_vision_position_ids(grids, merge)}
    if hasattr(visual, "pos_embed"):
        indices, weights = get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        given |= {"interp_indices": indices, "interp_weights": weights}
    given = {name: tensor.to(cut.device) for name, tensor in given.items()}
    found = visual(cut.flatten(0, 1), grid_thw=grids, **given)
    seen, deep = found.pooler_output, getattr(found, "deepstack_features", [])
    # Where they belong the library finds by values, which the meta device has not. Added here, they
    # cost the same.
    if cut.is_meta:
        seen, deep = reduce(torch.add, deep, seen), []
    return seen.unflatten(0, (len(cut), -1)), deep


def _in_line(like: Tensor) -> Tensor:
    """Return the place of every token as its time, row and column, shape (3, B, L)."""
    return torch.arange(like.shape[1], device=like.device).expand(3, len(like), -1)


def _positions(begin: int, grid: tuple[int, int], after: int, like: Tensor) -> Tensor:
    """Return time, row and column of every token, shape (3, B, L).

    Those of a text go on by one. An image has one time, its rows and columns count from there, and
    the text after it goes on behind the largest of them.

    Source: Wang et al. 2024, arXiv:2409.12191, multimodal rotary position embedding.
    """
    rows, columns = grid
    start = torch.arange(begin).expand(3, -1)
    square = torch.stack(
        [
            torch.zeros(rows * columns, dtype=torch.long),
            torch.arange(rows).repeat_interleave(columns),
            torch.arange(columns).repeat(rows),
        ]
    )
    end = torch.arange(after).expand(3, -1) + begin + max(rows, columns)
    whole = torch.cat([start, square + begin, end], dim=1).to(like.device)  # (3, L)
    return whole[:, None].expand(3, len(like), -1)


def known_kind(place: str, option: str) -> Any:
    """Return the configuration of a model, and refuse one that is not of `KINDS`.

    Raises:
        AssetError: If it cannot be read.
        ConfigError: If it is another model.
    """
    with loading(option, place):
        config = AutoConfig.from_pretrained(folder_or_id(place, option))
    if config.model_type not in KINDS:
        raise ConfigError(
            f"{option}: {place} is a model of the type {config.model_type}, expected one of "
            f"{', '.join(KINDS)}"
        )
    return config


def reading_on_meta(
    whole: torch.nn.Module, network: Any, rules: ImageRules, *, dtype: torch.dtype, words: int
) -> MetaReward:
    """Return the reading of an image and a text of so many tokens on the meta device.

    Args:
        whole: All that is in memory, on the meta device.
        network: The part of it that `hidden_states` runs.
        rules: How images become patches.
        dtype: Precision of the network.
        words: Tokens of the text.
    """
    text = Words((0,), (0,) * words)

    def read(images: Tensor) -> Tensor:
        texts, last = [text] * len(images), [words - 1] * len(images)
        return hidden_states(network, images, rules, texts, last, dtype=dtype).float()

    return MetaReward(read, whole, dtype=dtype)
