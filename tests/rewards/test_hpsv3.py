"""hpsv3 against a plain forward pass by transformers' own classes, on small random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear, relu
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from alignprop_cli.errors import AssetError
from alignprop_cli.images import to_uint8
from alignprop_cli.rewards.hpsv3 import HpsV3Reward
from tests.rewards.small import noise
from tests.rewards.small_qwen import INSTRUCTION, shrink_hpsv3, small_config, small_hpsv3

PROMPTS = ["a cat", "two dogs <|Reward|> and a boat"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_hpsv3(monkeypatch)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return small_hpsv3(tmp_path_factory.mktemp("hpsv3"))


def plain(options: dict[str, str], pictures: Tensor) -> Tensor:
    """Return the scores as the published code computes them, image by image."""
    processor: Any = AutoProcessor.from_pretrained(options["processor"])
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    token = processor.tokenizer.convert_tokens_to_ids("<|Reward|>")
    state = load_file(Path(options["weights"]) / "HPSv3.safetensors")
    model: Any = Qwen2VLForConditionalGeneration(small_config("qwen2_vl", processor)).eval()
    model.model.visual.load_state_dict(
        {n.removeprefix("visual."): t for n, t in state.items() if n.startswith("visual.")}
    )
    model.model.language_model.load_state_dict(
        {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
    )
    scores: list[Tensor] = []
    for picture, prompt in zip(pictures, PROMPTS, strict=True):
        text = INSTRUCTION.format(text_prompt=prompt)
        message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        chat = processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        batch = processor(text=[chat], images=[picture], return_tensors="pt")
        ids = batch["input_ids"]
        embeds = model.get_input_embeddings()(ids)
        seen = model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
        place = (ids == processor.image_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(place, seen.pooler_output)
        # What transformers 4.45 did without position_ids: the same number on all three axes.
        positions = torch.arange(ids.shape[1]).view(1, 1, -1).expand(3, 1, -1)
        read = model.model.language_model(inputs_embeds=embeds, position_ids=positions)
        values = read.last_hidden_state[0, (ids[0] == token).nonzero()[-1, 0]]
        for layer in (0, 3, 5):
            names = (f"rm_head.{layer}.weight", f"rm_head.{layer}.bias")
            values = linear(values if layer == 0 else relu(values), *(state[n] for n in names))
        scores.append(values[0])
    return torch.stack(scores)


def test_it_is_the_published_forward_pass(options: dict[str, str]) -> None:
    # Of the one size, and of whole bytes: nothing is resized or rounded.
    pictures = to_uint8(noise(112, 112, count=2)).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = plain(options, pictures)
    assert float(expected.std()) > 1e-3
    rewards = HpsV3Reward(**options)(pictures / 255.0, PROMPTS)
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-5)


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop("rm_head.5.bias"), r"lacks rm_head\.5\.bias \(1 names differ\)"),
        (drop("visual.merger.ln_q.weight"), r"lacks visual\.merger\.ln_q\.weight"),
        (lambda s: s.update({"model.extra": torch.zeros(1)}), r"has an unknown model\.extra"),
        (
            lambda s: s.update({"rm_head.0.weight": torch.zeros(1024, 33)}),
            r"rm_head\.0\.weight is \(1024, 33\), expected \(1024, 32\)",
        ),
        (
            lambda s: s.update({"model.embed_tokens.weight": torch.zeros(90, 32)}),
            r"it has 90 words, and with <\|Reward\|> .* has 267",
        ),
        (drop("model.embed_tokens.weight"), r"model\.embed_tokens\.weight"),
    ],
)
def test_another_checkpoint_is_refused(
    options: dict[str, str], tmp_path: Path, change: Callable[[Any], object], match: str
) -> None:
    state = load_file(Path(options["weights"]) / "HPSv3.safetensors")
    change(state)
    save_file(state, tmp_path / "HPSv3.safetensors")
    with pytest.raises(AssetError, match=rf"reward\.hpsv3\.weights: cannot load .*{match}"):
        HpsV3Reward(**{**options, "weights": str(tmp_path)})


def test_the_text_is_that_of_the_package_or_of_a_file(
    options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = {name: options[name] for name in ("weights", "processor")}
    with pytest.raises(AssetError, match=r"reward\.hpsv3\.instruction: .* package hpsv3, which"):
        HpsV3Reward(**rest)
    package = tmp_path / "hpsv3" / "dataset"
    package.mkdir(parents=True)
    first, last = INSTRUCTION.split("The rating")
    (package.parent / "__init__.py").write_text("import nothing_that_is_installed\n")
    (package / "data_collator_qwen.py").write_text(
        f"import pandas\nINSTRUCTION = {first!r}\n"
        f"prompt_with_special_token = {'The rating' + last!r}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert HpsV3Reward(**rest)._text == INSTRUCTION
    own = tmp_path / "own.txt"
    own.write_text("Rate {text_prompt}", encoding="utf-8")
    with pytest.raises(AssetError, match=r"instruction: .*own\.txt lacks <\|Reward\|>"):
        HpsV3Reward(**{**options, "instruction": str(own)})
