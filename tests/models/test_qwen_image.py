"""What is Qwen-Image's alone; the rest is in test_flow.py, with the other rectified flows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignprop_cli.config.schema import ModelConfig, SampleConfig
from alignprop_cli.errors import ConfigError
from alignprop_cli.guidance import Guidance, guided
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.base import Model, Source
from alignprop_cli.models.families import FAMILIES, open_model, sampler
from alignprop_cli.models.meta import meta_model
from alignprop_cli.models.qwen import LENGTH
from alignprop_cli.models.qwen_image import rescale_to_text
from alignprop_cli.models.taesd import on_meta as tiny_on_meta
from alignprop_cli.sampling import sample
from tests.factories import randn
from tests.flow_models import as_given, small_qwen_image
from tests.models.test_flow import CLOSE, CPU, PROMPTS, QWEN, load, noise, pipeline_of

SIZE = (8, 20)
LONG = "one small red circle on a black background, " * 20
"""More than 512 tokens of the small model's tokenizer, which reads single bytes."""

NEGATIVE = "blurred, with a frame of letters around it"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_qwen_image(tmp_path_factory.mktemp("qwen") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    """Return a loaded model that no test changes."""
    return load(folder, (*PROMPTS, LONG, NEGATIVE, ""))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return pipeline_of(QWEN, folder)


def as_latents(pipeline: Any, packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    return pipeline._unpack_latents(packed, *SIZE, pipeline.vae_scale_factor).view(shape)


@torch.no_grad()
def latents_of(
    model: Model, prompts: list[str], scale: float, guidance: Guidance | None = None
) -> Tensor:
    chain = sampler(
        SampleConfig(num_inference_steps=3, guidance_scale=scale, negative_prompt=NEGATIVE),
        model.family,
    )
    guidance = guidance or chain.guidance
    start = noise(model, SIZE, len(prompts))
    conditioning = model.conditioning(prompts, NEGATIVE if guidance.enabled else None)
    schedule = chain.schedule(model.network, tuple(start.shape[1:]))
    return sample(guided(model.network.predict, conditioning, guidance), start, schedule)


def test_guidance_is_the_pipelines_with_prompts_that_are_cut_and_a_long_negative_one(
    model: Model, pipeline: Any
) -> None:
    prompts = ["x", LONG, "a cat"]
    unguided = latents_of(model, prompts, 1.0)
    for scale in (1.0, 4.0):
        start = noise(model, SIZE)
        packed = pipeline(
            prompt=list(prompts),
            negative_prompt=[NEGATIVE] * 3,
            true_cfg_scale=scale,
            height=SIZE[0],
            width=SIZE[1],
            num_inference_steps=3,
            latents=as_given(pipeline, start),
            output_type="latent",
        ).images
        ours = latents_of(model, prompts, scale)
        torch.testing.assert_close(ours, as_latents(pipeline, packed, start.shape), **CLOSE)
        assert (float((ours - unguided).abs().max()) > 1e-2) is (scale > 1.0)
    # Without the norm of the text branch it would be another image.
    plain = latents_of(model, prompts, 4.0, Guidance(4.0))
    assert float((ours - plain).abs().max()) > 1e-2


@pytest.mark.parametrize("detach_uncond", [False, True])
def test_the_gradient_of_the_rescaled_guidance_is_that_of_the_pipelines_lines(
    pipeline: Any, detach_uncond: bool
) -> None:
    """The pipeline's own three lines on packed latents, differentiated by autograd."""
    uncond, text = (randn(seed, 2, 4, 4, 6).requires_grad_() for seed in (1, 2))
    weight = randn(3, 2, 4, 4, 6)
    constant = uncond.detach() if detach_uncond else uncond
    ours = Guidance(3.0, rescale=rescale_to_text).combine(constant, text)

    neg_noise_pred, noise_pred = (as_given(pipeline, one) for one in (constant, text))
    comb_pred = neg_noise_pred + 3.0 * (noise_pred - neg_noise_pred)
    cond_norm = torch.norm(noise_pred, dim=-1, keepdim=True)
    noise_norm = torch.norm(comb_pred, dim=-1, keepdim=True)
    theirs = pipeline._unpack_latents(comb_pred * (cond_norm / noise_norm), 8, 12, 2).squeeze(2)

    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    leaves = [text] if detach_uncond else [uncond, text]
    found, expected = (
        torch.autograd.grad((one * weight).sum(), leaves, retain_graph=True)
        for one in (ours, theirs)
    )
    for mine, other in zip(found, expected, strict=True):
        assert float(other.norm()) > 1e-2
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_every_token_has_the_norm_of_the_text_branchs() -> None:
    guidance, text = randn(1, 2, 4, 4, 6), randn(2, 2, 4, 4, 6)
    found = rescale_to_text(guidance, text)

    def norms(latents: Tensor) -> Tensor:
        squares = torch.nn.functional.avg_pool2d(latents.square(), 2).sum(dim=1)
        return (4.0 * squares).sqrt()  # (B, h / 2, w / 2)

    torch.testing.assert_close(norms(found), norms(text))
    # Its direction stays.
    one = (slice(0, 1), slice(None), slice(0, 2), slice(2, 4))
    cosine = torch.nn.functional.cosine_similarity(
        found[one].flatten(), guidance[one].flatten(), dim=0
    )
    assert float(cosine) == pytest.approx(1.0)


def test_each_prompt_of_a_batch_is_read_at_its_own_length(model: Model) -> None:
    # One token a byte, but for the three marks; the first 34 are not read.
    lengths = [len(model.embeds[prompt].tensors["hidden"]) for prompt in ("x", "a cat")]
    assert lengths[1] == lengths[0] + 4
    text = model.conditioning(PROMPTS, None).text
    assert text.tensors["hidden"].shape == (3, LENGTH, 24)
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


def test_there_is_a_mask_where_prompts_have_different_lengths_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    forward = model.network.module.forward

    def seen(**options: Any) -> Any:
        given.append(options)
        return forward(**options)

    monkeypatch.setattr(model.network.module, "forward", seen)
    with torch.no_grad():
        for prompts in (["x", "x"], ["x", "a cat"]):
            text = model.conditioning(prompts, None).text
            model.network.predict(noise(model, SIZE, 2), 700.0, text)
    same, other = given
    assert same["encoder_hidden_states_mask"] is None
    lengths = [len(model.embeds[prompt].tensors["hidden"]) for prompt in ("x", "a cat")]
    assert same["encoder_hidden_states"].shape[1] == lengths[0]
    assert other["encoder_hidden_states"].shape[1] == lengths[1]
    assert other["encoder_hidden_states_mask"].sum(dim=1).tolist() == lengths


def test_embeddings_are_the_pipelines_of_the_language_model_alone(
    model: Model, pipeline: Any, folder: Path
) -> None:
    hidden, mask = pipeline.encode_prompt(list(PROMPTS), max_sequence_length=LENGTH)
    for row, prompt in enumerate(PROMPTS):
        expected = hidden[row][mask[row].bool()]
        found = model.embeds[prompt].tensors["hidden"]
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)
    source = Source(ModelConfig(id=str(folder)), folder, torch.float32)
    encoder = FAMILIES["QwenImagePipeline"].load_text_encoders(source, CPU).encoder  # type: ignore[attr-defined]
    kept = sum(p.numel() for p in encoder.parameters())
    language = pipeline.text_encoder.model.language_model
    assert kept == sum(p.numel() for p in language.parameters())
    assert kept < sum(p.numel() for p in pipeline.text_encoder.parameters())


def test_prompts_that_are_not_read_to_their_end_are_told(folder: Path) -> None:
    said: list[str] = []
    model = open_model(ModelConfig(id=str(folder)), ["x", LONG], CPU, said.append)
    assert any("1 of 2 prompts" in text for text in said)
    assert len(model.embeds[LONG].tensors["hidden"]) == LENGTH


def test_the_prompts_own_projections_get_no_lora(folder: Path) -> None:
    module = meta_model(ModelConfig(id=str(folder)), torch.float32).parts.network.module
    targets = FAMILIES["QwenImagePipeline"].target_modules
    lora.inject(module, rank=2, alpha=2, target_modules=targets, seed=0)
    kinds = ("to_q", "to_k", "to_v", "to_out.0")
    assert {name.partition(".lora_")[0] for name in lora.named_trainable(module)} == {
        f"transformer_blocks.{i}.attn.{kind}" for i in range(2) for kind in kinds
    }


def test_a_small_autoencoder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    family, decoder = FAMILIES["QwenImagePipeline"], load(folder, ()).decoder
    for named, message in (
        ("taesd", "no AutoencoderTiny in diffusers format is published for Qwen-Image"),
        (str(tmp_path / "tiny"), f"no AutoencoderTiny reads the latents of {folder}"),
    ):
        config = ModelConfig(id=str(folder), decoder=named)
        with pytest.raises(ConfigError) as caught:
            tiny_on_meta(config, family, decoder, torch.float32)
        assert message in caught.value.message


def test_a_single_step_is_refused_since_the_scheduler_has_none(model: Model) -> None:
    """Its last level is stretched to shift_terminal, and with one step there is nothing between."""
    with pytest.raises(ConfigError, match=r"scheduler: the noise levels do not decrease"):
        model.network.schedule(1, model.network.latent_shape(*SIZE))
    assert len(model.network.schedule(2, model.network.latent_shape(*SIZE)).steps) == 2
