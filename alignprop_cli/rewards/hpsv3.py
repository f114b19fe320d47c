"""Human preference score v3: a Qwen2-VL-7B that rates an image for its prompt."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLModel

from alignprop_cli.errors import AssetError
from alignprop_cli.hub import folder_or_id, loading, locate
from alignprop_cli.paths import read_text, user_path
from alignprop_cli.prompts import is_cut
from alignprop_cli.rewards.base import without_autocast
from alignprop_cli.rewards.frozen import FrozenReward, MetaReward, exact, refuse_other_shapes
from alignprop_cli.rewards.qwen_vl import (
    QWEN2_VL_7B,
    QWEN2_VL_RULES,
    ImageRules,
    Words,
    hidden_states,
    reading_on_meta,
)

ARCHITECTURE = QWEN2_VL_7B.to_dict()
"""The network's sizes, all but its vocabulary, which the checkpoint says."""

_FILE = "HPSv3.safetensors"
_TOKEN = "<|Reward|>"
_WEIGHTS, _PROCESSOR = "reward.hpsv3.weights", "reward.hpsv3.processor"
_TEXT = "reward.hpsv3.instruction"
# Every image is resized to about as many pixels, 16 x 16 tokens if it is square.
_PIXELS = 256 * 28 * 28
# The parts of the text in the authors' package, and the file there that has them.
_PARTS = ("INSTRUCTION", "prompt_with_special_token")
_SOURCE = ("dataset", "data_collator_qwen.py")
# Tokens that the published model knows: those of Qwen2-VL-7B-Instruct, and its own.
_VOCABULARY = 151_658
# Tokens of the text with its prompt, that the planner reckons with.
_PLANNED = 640


class HpsV3Reward(FrozenReward):
    """rewards = the mean of the score's normal distribution, which the model predicts.

    The model reads the image, instructions with the prompt, and a token of its own, whose last
    hidden state goes through three layers to mean and spread; the spread is left out.

    Args:
        weights: The checkpoint, a folder that holds HPSv3.safetensors, or a hub id.
        processor: A folder or a hub id of the processor of Qwen2-VL-7B-Instruct.
        instruction: A file with the text: {text_prompt} stands for the prompt, and <|Reward|> is
            where the score is read. Unset is the text of the installed package hpsv3.

    Raises:
        AssetError: If the checkpoint, the processor or the text is missing or damaged, or the hub
            cannot be reached.

    Source: Ma et al. 2025, arXiv:2508.03789; MizzenAI/HPSv3 and the package hpsv3 1.0.0, whose
        model counts the places of the image's tokens as those of a text, unlike Qwen2-VL itself.
    """

    def __init__(
        self,
        weights: str = "MizzenAI/HPSv3",
        processor: str = "Qwen/Qwen2-VL-7B-Instruct",
        instruction: str | None = None,
    ) -> None:
        # 1. The small parts first, as the checkpoint has 16 GB.
        self._text = _read_instruction(instruction)
        with loading(_PROCESSOR, processor):
            self._processor: Any = AutoProcessor.from_pretrained(
                folder_or_id(processor, _PROCESSOR)
            )
            self._processor.tokenizer.add_special_tokens({"additional_special_tokens": [_TOKEN]})
            self._token = self._processor.tokenizer.convert_tokens_to_ids(_TOKEN)
            self._rules = _rules(ImageRules.of(self._processor.image_processor))
        # 2. The checkpoint, whose tensors must be those of the network and of the head.
        file = locate(weights, _FILE, option=_WEIGHTS)
        with loading(_WEIGHTS, str(file)):
            state = load_file(file)
            vocabulary = len(state["model.embed_tokens.weight"])
            if vocabulary != self._token + 1:
                raise ValueError(
                    f"it has {vocabulary} words, and with {_TOKEN} {processor} has "
                    f"{self._token + 1}"
                )
            self._network, self._head = _loaded(state, vocabulary)
        self.networks, self.heads = (self._network,), (self._head,)
        self.dtype = self._network.dtype
        self._head.to(exact(self.dtype))

    @classmethod
    def on_meta(cls, dtype: torch.dtype, **_options: Any) -> MetaReward | None:
        """Return the network on the meta device; see `FrozenReward`."""
        network = _on_meta(_VOCABULARY)
        rules = _rules(QWEN2_VL_RULES)
        return reading_on_meta(network, network, rules, dtype=dtype, words=_PLANNED)

    def cuts(self, prompt: str) -> bool:
        """Return whether the network does not read a prompt to its end: only the longest."""
        return is_cut(prompt)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the score of each image for its prompt, shape (B,). Differentiable in images."""
        texts = [Words.of(self._processor, self._asked(prompt)) for prompt in prompts]
        # The last one: a prompt may hold the word itself.
        where = [len(t.after) - 1 - t.after[::-1].index(self._token) for t in texts]
        read = hidden_states(
            self._network, images, self._rules, texts, where, dtype=self.dtype, in_line=True
        )  # (B, D)
        with without_autocast(images.device):
            return self._head(read.to(exact(self.dtype)))[:, 0]

    def _asked(self, prompt: str) -> str:
        return self._text.replace("{text_prompt}", prompt)


def _rules(own: ImageRules) -> ImageRules:
    """Return an image processor's rules with the one size of HPSv3."""
    return ImageRules(own.patch, own.merge, own.frames, _PIXELS, _PIXELS, own.mean, own.std)


def _head(width: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Linear(width, 1024),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.05),
        torch.nn.Linear(1024, 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 2),
    )


def _on_meta(vocabulary: int) -> Any:
    config: Any = Qwen2VLConfig(**ARCHITECTURE)
    config.text_config.vocab_size = vocabulary
    with torch.device("meta"):
        return Qwen2VLModel(config)


def _loaded(state: Mapping[str, Tensor], vocabulary: int) -> tuple[Any, torch.nn.Module]:
    """Return the frozen network and its head, with the tensors of a checkpoint.

    Args:
        state: Under the names of transformers 4.45, with which it was made.
        vocabulary: Number of tokens.

    Raises:
        ValueError: If tensors are missing, unknown or of another shape.
    """
    network = _on_meta(vocabulary)
    with torch.device("meta"):
        head = _head(network.config.text_config.hidden_size)
    expected = {_published(name): t for name, t in network.state_dict().items()}
    expected |= {f"rm_head.{name}": t for name, t in head.state_dict().items()}
    # The layer that would give logits is in the file, and not used.
    expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    refuse_other_shapes(state, expected)
    # Assigned, so that 16 GB are in memory once.
    network.load_state_dict({n: state[_published(n)] for n in network.state_dict()}, assign=True)
    head.load_state_dict({n: state[f"rm_head.{n}"] for n in head.state_dict()}, assign=True)
    # What no file has: frequencies, which are made from the sizes.
    for part, name in ((network.visual, "rotary_pos_emb"), (network.language_model, "rotary_emb")):
        setattr(part, name, type(getattr(part, name))(part.config))
    for module in (network, head):
        module.eval().requires_grad_(False)
    return network, head


def _published(name: str) -> str:
    """Return a tensor's name in the checkpoint."""
    inner = name.removeprefix("language_model.")
    return name if inner == name else f"model.{inner}"


def _read_instruction(file: str | None) -> str:
    """Return the text that is put to the model, with {text_prompt} and the token of the score.

    Raises:
        AssetError: If there is none, or it lacks one of the two.
    """
    if file is not None:
        text, source = read_text(user_path(file, _TEXT), _TEXT), file
    else:
        # Found, not imported: the package imports what it pins to old versions.
        found = importlib.util.find_spec("hpsv3")
        if found is None or not found.submodule_search_locations:
            raise AssetError(
                f"{_TEXT}: the text that HPSv3 reads is that of the package hpsv3, which is not "
                "installed",
                hint=f"pip install --no-deps hpsv3; or set {_TEXT} to a file with the text",
            )
        path = Path(found.submodule_search_locations[0]).joinpath(*_SOURCE)
        source = str(path)
        with loading(_TEXT, source):
            text = "".join(_constants(path)[name] for name in _PARTS)
    if missing := [part for part in ("{text_prompt}", _TOKEN) if part not in text]:
        raise AssetError(f"{_TEXT}: {source} lacks {missing[0]}")
    return text


def _constants(path: Path) -> dict[str, str]:
    """Return the texts that a Python file gives names to."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    named = [(n.targets[0], n.value) for n in body if isinstance(n, ast.Assign)]
    return {
        ast.unparse(target): value.value
        for target, value in named
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    }
