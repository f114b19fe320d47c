"""What is Krea 2's alone; the rest is in test_flow.py, with the other rectified flows."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLModel

from alignprop_cli.config.schema import ModelConfig, SampleConfig
from alignprop_cli.guidance import Embeds, guided
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.base import Model
from alignprop_cli.models.families import FAMILIES, open_model, sampler
from alignprop_cli.models.meta import meta_model
from alignprop_cli.models.qwen import LENGTH
from alignprop_cli.sampling import sample
from tests.flow_models import as_given, small_krea2
from tests.models.test_flow import (
    CLOSE,
    CPU,
    KREA2,
    PROMPTS,
    changed,
    draw,
    draw_with_diffusers,
    load,
    noise,
    pipeline_of,
)

SIZE = (32, 32)
LONG = "one small red circle on a black background, " * 20
"""More than 512 tokens of the small model's tokenizer, which reads single bytes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_krea2(tmp_path_factory.mktemp("krea2") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    """Return a loaded model that no test changes."""
    return load(folder, (*PROMPTS, LONG, ""))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return pipeline_of(KREA2, folder)


@torch.no_grad()
def latents_of(model: Model, prompts: list[str], scale: float, negative: str) -> torch.Tensor:
    chain = sampler(SampleConfig(num_inference_steps=3, guidance_scale=scale), model.family)
    conditioning = model.conditioning(prompts, negative if chain.guidance.enabled else None)
    start = noise(model, SIZE, len(prompts))
    schedule = chain.schedule(model.network, tuple(start.shape[1:]))
    return sample(guided(model.network.predict, conditioning, chain.guidance), start, schedule)


def test_any_scale_above_zero_guides_as_in_the_pipeline(model: Model, pipeline: Any) -> None:
    """Counted from the prompt's branch: 0.5 is 1.5 of other families, and 1 is not off.

    With a negative prompt longer than the prompts, and a prompt longer than what is read.
    """
    negative, prompts = "two small dogs", ["x", LONG, "a cat"]
    for scale in (0.5, 1.0):
        packed = pipeline(
            prompt=prompts,
            negative_prompt=[negative] * 3,
            height=SIZE[0],
            width=SIZE[1],
            num_inference_steps=3,
            guidance_scale=scale,
            latents=as_given(pipeline, noise(model, SIZE)),
            output_type="latent",
        ).images
        expected = pipeline._unpack_latents(packed, *SIZE).squeeze(2)
        ours = latents_of(model, prompts, scale, negative)
        torch.testing.assert_close(ours, expected, **CLOSE)
        unguided = latents_of(model, prompts, 0.0, negative)
        assert float((ours - unguided).abs().max()) > 1e-2


def test_a_prompt_is_kept_without_its_padding_and_read_as_in_the_pipeline(
    model: Model, pipeline: Any
) -> None:
    for prompt in (*PROMPTS, LONG):
        hidden, mask = pipeline.get_text_hidden_states(prompt, LENGTH)
        assert hidden.shape == (1, LENGTH, 3, 24)
        kept = model.embeds[prompt].tensors["hidden"]
        # One token a byte, and five after the padding.
        assert len(kept) == int(mask.sum()) == min(len(prompt) + 5, LENGTH)
        assert torch.equal(kept, hidden[0, mask[0]].detach())
    # Padding does not consume positions: what is after it does not depend on its length.
    for prompt in PROMPTS:
        shorter, mask = pipeline.get_text_hidden_states(prompt, 64)
        found = model.embeds[prompt].tensors["hidden"]
        torch.testing.assert_close(found, shorter[mask].detach(), rtol=0.0, atol=1e-5)


def test_the_network_reads_no_more_tokens_than_the_longest_prompt_has(model: Model) -> None:
    seen: list[dict[str, Any]] = []

    def spy(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        seen.append(options)

    text = model.conditioning(PROMPTS, None).text
    assert text.tensors["hidden"].shape == (3, LENGTH, 3, 24)
    assert text.tensors["length"].tolist() == [10, 19, 6]
    start = noise(model, SIZE)
    with torch.no_grad(), model.network.module.register_forward_pre_hook(spy, with_kwargs=True):
        together = model.network.predict(start, 700.0, text)
        alone = [
            model.network.predict(start[row : row + 1], 700.0, model.conditioning([p], None).text)
            for row, p in enumerate(PROMPTS)
        ]
        torch.testing.assert_close(together, torch.cat(alone), rtol=0.0, atol=1e-5)
        # With all of the padding, masked, the result is the same; unmasked it is another.
        padded = text.tensors["hidden"]
        numbers = torch.arange(LENGTH)
        places = torch.zeros(LENGTH + 4, 3)
        places[-4:] = seen[0]["position_ids"][-4:]
        whole = seen[0] | {"encoder_hidden_states": padded, "position_ids": places}
        mask = numbers < text.tensors["length"][:, None]
        expected = model.network.module(**whole | {"encoder_attention_mask": mask})[0]
        unmasked = model.network.module(**whole | {"encoder_attention_mask": None})[0]
        ours = model.network.module(**seen[0])[0]
    torch.testing.assert_close(ours, expected, rtol=0.0, atol=1e-5)
    assert float((unmasked - expected).abs().max()) > 1e-3
    assert [options["encoder_hidden_states"].shape[1] for options in seen[:4]] == [19, 10, 19, 6]
    assert seen[0]["encoder_attention_mask"].sum(1).tolist() == [10, 19, 6]
    assert all(options["encoder_attention_mask"] is None for options in seen[1:4])


def test_the_distilled_model_has_one_shift_for_all_sizes_and_is_not_guided(
    tmp_path: Path,
) -> None:
    turbo = small_krea2(tmp_path / "turbo", pipeline_is_distilled=True)
    said: list[str] = []
    config = ModelConfig(id=str(turbo), dtype="float32")
    model = open_model(config, [*PROMPTS, ""], CPU, said.append)
    assert any("was distilled without guidance" in text for text in said)
    pipeline = pipeline_of(KREA2, turbo)
    for size in ((32, 32), (16, 48)):
        # Whatever scale the run has, it is the pipeline's 0.
        ours = draw(model, size, 4.5)
        theirs = draw_with_diffusers(pipeline, model, size, 0.0)
        for mine, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, expected, **CLOSE)
    shape = model.network.latent_shape
    assert model.network.schedule(8, shape(32, 32)) == model.network.schedule(8, shape(64, 64))


def test_the_published_models_step_as_their_pipeline_does() -> None:
    """Levels e^mu / (e^mu + 1 / u - 1) for u = 1, 7 / 8, ..., 1 / 8."""

    def last(name: str, pixels: int, steps: int) -> float:
        network: Any = meta_model(ModelConfig(id=name), torch.bfloat16).parts.network
        schedule = network.schedule(steps, network.latent_shape(pixels, pixels))
        return schedule.path_share([steps - 1])

    def level(mu: float, steps: int) -> float:
        return math.exp(mu) / (math.exp(mu) + steps - 1)

    for pixels in (512, 1024):
        share = last("krea/Krea-2-Turbo", pixels, 8)
        assert share == pytest.approx(level(1.15, 8), rel=1e-5)
        # From 0.5 at 256 tokens to 1.15 at 6400.
        mu = 0.5 + 0.65 * ((pixels // 16) ** 2 - 256) / (6400 - 256)
        assert last("krea/Krea-2-Raw", pixels, 28) == pytest.approx(level(mu, 28), rel=1e-5)


def test_norms_stay_in_float32_as_diffusers_loads_them(folder: Path) -> None:
    model, pipeline = load(folder, (), dtype="bfloat16"), pipeline_of(KREA2, folder)
    half = pipeline_of(KREA2, folder, dtype=torch.bfloat16).transformer
    expected = {name: p.dtype for name, p in half.named_parameters()}
    assert set(expected.values()) == {torch.bfloat16, torch.float32}
    made = meta_model(ModelConfig(id=str(folder)), torch.bfloat16).parts.network
    for network in (model.network, made):
        assert {name: p.dtype for name, p in network.module.named_parameters()} == expected
        assert network.dtype == torch.bfloat16  # type: ignore[attr-defined]
    exact = dict(pipeline.transformer.named_parameters())
    for name, parameter in model.network.module.named_parameters():
        if parameter.dtype == torch.float32:
            assert torch.equal(parameter, exact[name])


def test_a_text_encoder_with_a_language_head_gives_the_same_embeddings(
    model: Model, folder: Path, tmp_path: Path
) -> None:
    kind = ["transformers", "Qwen3VLForConditionalGeneration"]
    copy = changed(folder, tmp_path / "copy", "model_index.json", text_encoder=kind)
    body = Qwen3VLModel.from_pretrained(folder / "text_encoder")
    whole = Qwen3VLForConditionalGeneration(body.config)
    whole.model = body
    shutil.rmtree(copy / "text_encoder")
    whole.save_pretrained(copy / "text_encoder")
    for prompt, embeds in load(copy).embeds.items():
        expected = model.embeds[prompt].tensors["hidden"]
        assert torch.equal(embeds.tensors["hidden"], expected)


def test_prompts_that_are_not_read_to_their_end_are_told(folder: Path) -> None:
    said: list[str] = []
    open_model(ModelConfig(id=str(folder)), ["x" * 507, LONG], CPU, said.append)
    assert any("1 of 2 prompts" in text for text in said)


def test_the_text_fusion_gets_no_lora_and_stores_nothing(folder: Path) -> None:
    model = load(folder)
    module = model.network.module
    lora.inject(
        module,
        rank=2,
        alpha=2,
        target_modules=FAMILIES["Krea2Pipeline"].target_modules,
        seed=0,
    )
    kinds = ("to_q", "to_k", "to_v", "to_gate", "to_out.0")
    assert {name.partition(".lora_")[0] for name in lora.named_trainable(module)} == {
        f"transformer_blocks.{i}.attn.{kind}" for i in range(3) for kind in kinds
    }
    fused: list[torch.Tensor] = []
    module.text_fusion.register_forward_hook(lambda *call: fused.append(call[-1]))
    embeds: Embeds = model.conditioning(["x"], None).text
    flow = model.network.predict(noise(model, SIZE, 1).requires_grad_(), 500.0, embeds)
    assert flow.requires_grad
    assert not fused[0].requires_grad
