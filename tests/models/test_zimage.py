"""What is Z-Image's alone; the rest is in test_flow.py, with the other rectified flows."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM, Qwen3Model

from alignprop_cli.config.schema import ModelConfig, SampleConfig
from alignprop_cli.errors import ConfigError
from alignprop_cli.guidance import Conditioning, guided
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.base import Model
from alignprop_cli.models.families import FAMILIES, open_model, sampler
from alignprop_cli.models.meta import meta_model
from alignprop_cli.models.qwen import LENGTH
from alignprop_cli.prompts import PromptStream
from alignprop_cli.sampling import sample
from alignprop_cli.training.trial import Trial
from tests.flow_models import small_zimage
from tests.models.test_flow import CLOSE, CPU, PROMPTS, ZIMAGE, changed, load, noise, pipeline_of
from tests.planning.test_footprint import config, plan_of, trainer

SIZE = (64, 64)
LONG = "one small red circle on a black background, " * 20
"""More than 512 tokens of the small model's tokenizer, which reads single bytes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_zimage(tmp_path_factory.mktemp("zimage") / "model")


@torch.no_grad()
def latents_of(model: Model, prompts: list[str], scale: float, negative: str = "") -> torch.Tensor:
    chain = sampler(SampleConfig(num_inference_steps=4, guidance_scale=scale), model.family)
    conditioning = model.conditioning(prompts, negative if chain.guidance.enabled else None)
    start = noise(model, SIZE, len(prompts))
    schedule = chain.schedule(model.network, tuple(start.shape[1:]))
    return sample(guided(model.network.predict, conditioning, chain.guidance), start, schedule)


def test_any_scale_above_zero_guides_as_in_the_pipeline(folder: Path) -> None:
    """Counted from the prompt's branch: 0.5 is 1.5 of other families, and 1 is not off.

    With a negative prompt longer than the prompts, and prompts longer than what is read.
    """
    negative, prompts = "blurred, with a frame of letters around it", ["x", LONG, "a dog"]
    model, pipeline = load(folder, (*prompts, negative)), pipeline_of(ZIMAGE, folder)
    for scale in (0.5, 1.0, 5.0):
        expected = pipeline(
            prompt=list(prompts),
            negative_prompt=[negative] * 3,
            height=SIZE[0],
            width=SIZE[1],
            num_inference_steps=4,
            guidance_scale=scale,
            latents=noise(model, SIZE),
            output_type="latent",
        ).images
        ours = latents_of(model, prompts, scale, negative)
        torch.testing.assert_close(ours, expected, **CLOSE)
        unguided = latents_of(model, prompts, 0.0)
        assert float((ours - unguided).abs().max()) > 1e-2


def test_each_prompt_of_a_batch_is_read_at_its_own_length(folder: Path) -> None:
    model = load(folder, (*PROMPTS, ""))
    assert {len(model.embeds[prompt].tensors["hidden"]) for prompt in PROMPTS} == {20, 24, 33}
    text = model.conditioning(PROMPTS, None).text
    assert text.tensors["hidden"].shape == (3, LENGTH, 24)
    assert text.tensors["length"].tolist() == [24, 33, 20]
    start = noise(model, SIZE)
    with torch.no_grad():
        together = model.network.predict(start, 700.0, text)
        for row, prompt in enumerate(PROMPTS):
            alone = model.conditioning([prompt], None).text
            expected = model.network.predict(start[row : row + 1], 700.0, alone)
            torch.testing.assert_close(together[row : row + 1], expected, rtol=0.0, atol=1e-5)
            # Where another row's length is taken, the result is another.
            wrong = dict(alone.tensors) | {"length": torch.tensor([LENGTH])}
            found = model.network.predict(start[row : row + 1], 700.0, type(alone)(wrong))
            assert float((found - expected).abs().max()) > 1e-3


def test_in_bfloat16_the_latents_between_the_steps_stay_in_float32(folder: Path) -> None:
    model = load(folder, dtype="bfloat16")
    pipeline = pipeline_of(ZIMAGE, folder, dtype=torch.bfloat16)
    expected = pipeline(
        prompt=list(PROMPTS),
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=4,
        guidance_scale=0.0,
        latents=noise(model, SIZE),
        output_type="latent",
    ).images
    ours = latents_of(model, PROMPTS, 0.0)
    assert ours.dtype == expected.dtype == torch.float32
    # Rounded to bfloat16 at every step, they would be a thousandth off.
    torch.testing.assert_close(ours, expected, rtol=0.0, atol=1e-4)
    assert float((ours.bfloat16().float() - ours).abs().mean()) > 1e-3


def test_a_text_encoder_with_a_language_head_gives_the_same_embeddings(
    folder: Path, tmp_path: Path
) -> None:
    kind = ["transformers", "Qwen3ForCausalLM"]
    copy = changed(folder, tmp_path / "copy", "model_index.json", text_encoder=kind)
    body = Qwen3Model.from_pretrained(folder / "text_encoder")
    whole = Qwen3ForCausalLM(body.config)
    whole.model = body
    shutil.rmtree(copy / "text_encoder")
    whole.save_pretrained(copy / "text_encoder")
    found = load(copy).embeds
    for prompt, embeds in load(folder).embeds.items():
        assert torch.equal(embeds.tensors["hidden"], found[prompt].tensors["hidden"])


def test_prompts_that_are_not_read_to_their_end_are_told(folder: Path) -> None:
    said: list[str] = []
    model = open_model(ModelConfig(id=str(folder)), ["x", LONG], CPU, said.append)
    assert any("1 of 2 prompts" in text for text in said)
    assert len(model.embeds[LONG].tensors["hidden"]) == LENGTH


def test_the_refiners_get_no_lora(folder: Path) -> None:
    module = meta_model(ModelConfig(id=str(folder)), torch.float32).parts.network.module
    targets = FAMILIES["ZImagePipeline"].target_modules
    lora.inject(module, rank=2, alpha=2, target_modules=targets, seed=0)
    kinds = ("to_q", "to_k", "to_v", "to_out.0")
    assert {name.partition(".lora_")[0] for name in lora.named_trainable(module)} == {
        f"layers.{i}.attention.{kind}" for i in range(3) for kind in kinds
    }


@pytest.mark.parametrize("values", [{"axes_dims": [4, 6, 8]}, {"n_heads": 3}])
def test_heads_that_do_not_fit_their_positions_are_refused(
    folder: Path, tmp_path: Path, values: dict[str, object]
) -> None:
    copy = changed(folder, tmp_path / "copy", "transformer/config.json", **values)
    for refused in (
        lambda: load(copy, ()),
        lambda: meta_model(ModelConfig(id=str(copy)), torch.float32),
    ):
        with pytest.raises(ConfigError, match=r"axes_dims: expected .* dim / n_heads"):
            refused()


def test_the_probe_tries_the_longest_prompt_there_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later step may draw it; which of them the first step has is chance."""
    prompts = ["x", "the longest prompt of all", "a longer prompt"]
    chosen = config(str(folder), steps=1)
    sampled = chosen.sample.model_copy(update={"height": 32, "width": 32})
    made = trainer(plan_of(1), chosen.model_copy(update={"sample": sampled}), "x")
    model, made.stream = made.model, PromptStream(prompts, 0)
    loaded = load(folder, (*prompts, ""))
    model.embeds, model.longest_prompt = loaded.embeds, loaded.longest_prompt
    read: list[tuple[str, ...]] = []
    conditioning = model.conditioning

    def seen(prompts: Sequence[str], negative: str | None) -> Conditioning:
        read.append(tuple(prompts))
        return conditioning(prompts, negative)

    monkeypatch.setattr(model, "conditioning", seen)
    Trial(made).run_micro_batch()
    assert set(read) == {(prompts[1],)}
