"""How the embedded flow models are trained: a few steps of the real scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from alignprop_cli.models.families import TINY
from alignprop_cli.tiny import language as data
from alignprop_cli.tiny.make import checkpoint, fewstep, flow, transformer
from tests.factories import randn

CPU = torch.device("cpu")
ROOKS = ((1, 0), (-1, 0), (0, 1), (0, -1))
BISHOPS = ((1, 1), (1, -1), (-1, 1), (-1, -1))


@pytest.fixture(scope="module")
def tiny() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(tiny: StableDiffusionPipeline) -> StableDiffusion3Pipeline:
    """Return one with random weights; an untrained network predicts zero."""
    network = transformer.new_transformer()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return flow.assemble(tiny, network.eval().requires_grad_(False))


def test_an_untrained_transformer_predicts_zero() -> None:
    network = transformer.new_transformer()
    arguments = randn(0, 2, 12, 12, 12).float(), randn(1, 2, 17, 192).float()
    found = network(*arguments, randn(2, 2, 192).float(), torch.tensor([1.0, 999.0]))
    assert torch.equal(found.sample, torch.zeros(2, 12, 12, 12))


def test_attention_starts_at_the_neighbours_of_each_patch() -> None:
    torch.manual_seed(0)
    network = transformer.new_transformer()
    embedded = network.pos_embed(randn(0, 64, 12, 12, 12).float())
    inputs = torch.nn.functional.layer_norm(embedded, (96,))
    # Patches are numbered row by row, six in a row; x is to the right, y down.
    for number, neighbours in enumerate([ROOKS, BISHOPS, ROOKS]):
        attention = network.transformer_blocks[number].attn
        queries, keys = (
            layer(inputs).unflatten(-1, (4, 24)) for layer in (attention.to_q, attention.to_k)
        )
        scores = torch.einsum("bihd,bjhd->bhij", queries, keys) / 24**0.5
        shares = scores.softmax(dim=-1).mean(dim=0)
        for head, (x, y) in enumerate(neighbours):
            for row, column in [(2, 2), (3, 3), (2, 3)]:
                there = (row + y) * 6 + column + x
                # Equal attention to all patches is 1 / 36.
                assert shares[head, row * 6 + column, there] > 10 / 36


def test_one_token_of_padding_that_counts_as_many_draws_the_same(pipeline) -> None:
    prompts = data.heldout_prompts()[:3]
    options = {
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "latents": randn(3, 3, 12, 12, 12).float(),
        "output_type": "latent",
    }
    plain = pipeline(prompts, **options).images
    faster = flow.short(pipeline)(prompts, **options).images
    assert plain.std() > 0.1
    torch.testing.assert_close(faster, plain, rtol=0.0, atol=1e-5)


def test_the_text_encoders_are_the_trained_one_and_its_first_layer(tiny) -> None:
    prompt = data.heldout_prompts()[0]
    tokens = tiny.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    trained = tiny.text_encoder(tokens, output_hidden_states=True)
    first, second = (encoder(tokens) for encoder in flow.text_encoders(tiny.text_encoder))
    assert torch.equal(first.text_embeds, trained.pooler_output)
    normed = tiny.text_encoder.final_layer_norm(trained.hidden_states[1])
    assert torch.allclose(second.last_hidden_state, normed)


class Cut(Exception):
    """What ends a run half-way."""


@pytest.mark.long
def test_an_interrupted_training_resumes_with_the_same_weights(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {"latents": randn(4, 8, 12, 12, 12).half(), "chosen": torch.arange(8)}
    for name, value in (("BATCH", 4), ("SAVED_EVERY", 2), ("CHECKED", 1)):
        monkeypatch.setattr(flow, name, value)
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
        torch.save(drawn, tmp_path / folder / "latents.pt")
    whole = flow.train(tiny, tmp_path / "whole", CPU, 4)

    save = checkpoint.save

    def save_and_stop(*arguments, **parts) -> None:
        save(*arguments, **parts)
        raise Cut

    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    with pytest.raises(Cut):
        flow.train(tiny, tmp_path / "parts", CPU, 4)
    monkeypatch.setattr(checkpoint, "save", save)
    resumed = flow.train(tiny, tmp_path / "parts", CPU, 4)
    assert whole.proj_out.weight.abs().max() > 0.0
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_teachers_paths_are_those_of_the_pipeline(
    pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fewstep, "PATHS", 3)
    flow.short(pipeline)
    points, chosen = fewstep.sample_paths(pipeline, tmp_path, CPU)
    assert points.shape == (3, 5, 12, 12, 12)
    drawn = pipeline(
        [data.train_prompts()[i] for i in chosen],
        sigmas=[1.0 - call / 12 for call in range(12)],
        guidance_scale=flow.GUIDANCE_SCALE,
        latents=points[:, 0].float(),
        max_sequence_length=1,
        output_type="latent",
    ).images
    # Stored in half precision, the start too.
    torch.testing.assert_close(points[:, -1].float(), drawn, rtol=0.01, atol=0.01)


@pytest.mark.slow
def test_the_student_learns_to_take_the_teachers_steps_at_once(
    pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("PATHS", 4), ("BATCH", 16), ("CHECKED", 1)):
        monkeypatch.setattr(fewstep, name, value)
    student = fewstep.train(pipeline, tmp_path, CPU, 60)
    points, chosen = fewstep.sample_paths(pipeline, tmp_path, CPU)

    def error(network) -> float:
        drawn = fewstep.few_calls(fewstep.with_network(pipeline, network))(
            [data.train_prompts()[i] for i in chosen],
            guidance_scale=0.0,
            latents=points[:, 0].float(),
            max_sequence_length=1,
            output_type="latent",
        ).images
        return float((drawn - points[:, -1]).square().mean())

    assert error(student) < 0.5 * error(pipeline.transformer)
