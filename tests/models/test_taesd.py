"""The approximate decoder: the images of plain diffusers, its gradient, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    Flux2KleinPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import AlignPropError, AssetError, ConfigError
from alignprop_cli.models import taesd
from alignprop_cli.models.base import Model
from alignprop_cli.models.families import FAMILIES, open_model
from alignprop_cli.models.taesd import TinyDecoder
from alignprop_cli.planning import meter
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.estimate import Budget
from alignprop_cli.planning.sampling import fitting_batch
from tests.factories import randn, small_pipeline, small_xl_pipeline
from tests.flow_models import small_klein, small_sd3

CPU = torch.device("cpu")
CASES: dict[str, tuple[Callable[..., Path], Any, int]] = {
    "sd": (small_pipeline, StableDiffusionPipeline, 4),
    "sdxl": (small_xl_pipeline, StableDiffusionXLPipeline, 4),
    "sd3": (small_sd3, StableDiffusion3Pipeline, 8),
    "klein": (small_klein, Flux2KleinPipeline, 4),
}
"""Builder, pipeline, and channels of the autoencoder's latents."""


def small_tiny(path: Path, **options: Any) -> Path:
    """Write an AutoencoderTiny with random weights whose latents are half as wide as the image."""
    values: dict[str, Any] = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (2, 1),
        **options,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        made = AutoencoderTiny(**values)
    # Most pixels are inside [0, 1], where clamping does nothing.
    last: Any = made.decoder.layers[-1]
    last.weight.data.mul_(0.5)
    last.bias.data.fill_(0.5)
    made.save_pretrained(path)
    return path


def loaded(folder: Path, decoder: str) -> tuple[Model, TinyDecoder]:
    config = ModelConfig(id=str(folder), decoder=decoder)
    model = open_model(config, [], CPU)
    found = taesd.load(config, model.family, model.decoder, torch.float32, CPU)
    assert found is not None
    return model, found


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_the_image_is_that_of_the_pipeline_with_this_autoencoder(name: str, tmp_path: Path) -> None:
    build, pipeline_class, channels = CASES[name]
    folder = build(tmp_path / "model")
    tiny = small_tiny(tmp_path / "tiny", latent_channels=channels)
    model, decoder = loaded(folder, str(tiny))
    pipeline = pipeline_class.from_pretrained(folder, vae=AutoencoderTiny.from_pretrained(tiny))
    pipeline.set_progress_bar_config(disable=True)
    noise = randn(1, 1, *model.network.latent_shape(None, None), dtype=torch.float32)
    drawn = [
        pipeline("a small dog", num_inference_steps=2, latents=noise.clone(), output_type=kind)
        for kind in ("latent", "pt")
    ]
    latents, expected = (one.images for one in drawn)
    found = decoder.decode(latents)
    assert float(expected.std()) > 0.01
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)
    # Not what the model's own decoder makes of the same latents.
    assert float((model.decoder.decode(latents) - found).abs().mean()) > 0.01


def test_flux_2_latents_are_taken_out_of_their_patches_alone(tmp_path: Path) -> None:
    """As the card of TAEF2 does: the statistics of the batch normalisation are left out."""
    folder = small_klein(tmp_path / "model")
    tiny = small_tiny(tmp_path / "tiny")
    model, decoder = loaded(folder, str(tiny))
    latents = randn(1, 2, *model.network.latent_shape(32, 16), dtype=torch.float32)
    whole = Flux2KleinPipeline._unpatchify_latents(latents)
    expected = AutoencoderTiny.from_pretrained(tiny).decode(whole).sample / 2 + 0.5
    found = decoder.decode(latents)
    assert found.shape == (2, 3, 32, 16)
    torch.testing.assert_close(found, expected.clamp(0.0, 1.0), rtol=0.0, atol=1e-6)


def test_scale_and_shift_of_its_configuration_are_obeyed(tmp_path: Path) -> None:
    folder = small_sd3(tmp_path / "model")
    numbers = {"scaling_factor": 1.7, "shift_factor": 0.3}
    tiny = small_tiny(tmp_path / "tiny", latent_channels=8, **numbers)
    model, decoder = loaded(folder, str(tiny))
    latents = randn(1, 1, *model.network.latent_shape(None, None), dtype=torch.float32)
    # StableDiffusion3Pipeline: latents / scaling_factor + shift_factor.
    expected = AutoencoderTiny.from_pretrained(tiny).decode(latents / 1.7 + 0.3).sample / 2 + 0.5
    torch.testing.assert_close(
        decoder.decode(latents), expected.clamp(0.0, 1.0), rtol=0.0, atol=1e-6
    )


def test_the_gradient_is_the_central_difference_and_the_same_when_recomputed(
    tmp_path: Path,
) -> None:
    # No saturated pixel, whose gradient is another by `images.saturate`.
    folder = small_pipeline(tmp_path / "model")
    tiny = small_tiny(tmp_path / "tiny")
    _, decoder = loaded(folder, str(tiny))
    decoder.module.double()
    latents = 0.1 * randn(1, 1, 4, 4, 4)
    weight = randn(2, 1, 3, 8, 8)

    def value(at: Tensor) -> Tensor:
        return (decoder.decode(at) * weight).sum()

    grads: list[Tensor] = []
    stored: list[int] = []
    for recompute in (False, True):
        leaf = latents.clone().requires_grad_()
        with meter.SavedBytes([*decoder.parameters(), leaf]) as kept:
            images = decoder.decode(leaf, recompute=recompute)
        stored.append(kept.total)
        (images * weight).sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    inside = decoder.decode(latents)
    assert float(inside.min()) > 0.0
    assert float(inside.max()) < 1.0
    assert torch.equal(*grads)
    assert stored[1] < 0.7 * stored[0]
    direction = randn(3, *latents.shape)
    step = 1e-6
    difference = (value(latents + step * direction) - value(latents - step * direction)) / 2 / step
    assert float((grads[0] * direction).sum()) == pytest.approx(float(difference), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"latent_channels": 16}, "latent_channels: 16, the model has 4"),
        (
            {"decoder_block_out_channels": (8, 8, 8), "num_decoder_blocks": (1, 1, 1)},
            "pixels a latent: 4, the model has 2",
        ),
        ({"out_channels": 4}, "out_channels: 4, the model has 3"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = small_pipeline(tmp_path / "model")
    tiny = small_tiny(tmp_path / "tiny", **options)
    with pytest.raises(ConfigError) as caught:
        loaded(folder, str(tiny))
    assert caught.value.message == f"model.decoder: {tiny} does not fit {folder}: {said}"
    # The dry run says the same.
    with pytest.raises(ConfigError, match="does not fit"):
        measured(folder, str(tiny))


def measured(folder: Path, decoder: str) -> planning.Footprint:
    chosen = parse(
        {
            "model": {"id": str(folder), "decoder": decoder},
            "sample": {"num_inference_steps": 2},
            "reward": {"brightness": {}},
        }
    )
    return planning.measure(chosen, "cpu")


def test_what_is_missing_or_damaged_is_told(tmp_path: Path) -> None:
    folder = small_pipeline(tmp_path / "model")
    tiny = small_tiny(tmp_path / "tiny")

    def error(decoder: object) -> AlignPropError:
        with pytest.raises(AlignPropError) as caught:
            loaded(folder, str(decoder))
        return caught.value

    missing = error(tmp_path / "nowhere")
    assert missing.exit_code == 3
    assert missing.message == f"model.decoder: no such folder: {tmp_path / 'nowhere'}"
    assert "taesd" in (missing.hint or "")
    # Tests have no hub.
    unreached = error("someone/tiny-decoder")
    assert unreached.exit_code == 3
    assert unreached.message.startswith("model.decoder: cannot load someone/tiny-decoder: ")
    another = error(folder / "vae")
    assert "is a AutoencoderKL; it must be an AutoencoderTiny" in another.message
    weights = tiny / "diffusion_pytorch_model.safetensors"
    assert weights.is_file()
    weights.unlink()
    assert error(tiny).exit_code == 3
    (tiny / "config.json").write_text("{")
    assert f"model.decoder: cannot load {tiny / 'config.json'}" in error(tiny).message
    (tiny / "config.json").unlink()
    assert error(tiny).message == f"model.decoder: cannot load {tiny}: it has no config.json"


def test_taesd_is_the_published_one_of_the_family_where_there_is_one(tmp_path: Path) -> None:
    published = {name: family.taesd for name, family in FAMILIES.items()}
    assert published["StableDiffusionPipeline"] == "madebyollin/taesd"
    assert published["StableDiffusionXLPipeline"] == "madebyollin/taesdxl"
    assert published["StableDiffusion3Pipeline"] == "madebyollin/taesd3"
    # Planned without a download.
    config = ModelConfig(id="stabilityai/stable-diffusion-3.5-medium", decoder="taesd")
    said = taesd.describe(config, FAMILIES["StableDiffusion3Pipeline"])
    assert said is not None
    assert said.startswith("decoder: madebyollin/taesd3 for the rewards of training, an approx")
    assert taesd.describe(ModelConfig(), FAMILIES["StableDiffusion3Pipeline"]) is None
    # TAEF2 is another kind of network.
    with pytest.raises(ConfigError) as caught:
        measured(small_klein(tmp_path / "klein"), "taesd")
    assert caught.value.message == (
        "model.decoder: no AutoencoderTiny in diffusers format is published for FLUX.2-klein"
    )


def test_the_plan_counts_it_for_training_and_the_own_decoder_for_samples(tmp_path: Path) -> None:
    folder = small_pipeline(tmp_path / "model")
    tiny = small_tiny(tmp_path / "tiny")
    full, found = measured(folder, "full"), measured(folder, str(tiny))
    model, decoder = loaded(folder, str(tiny))
    held = [*model.decoder.module.parameters(), *decoder.module.parameters()]
    assert found.weights["decoder weights"] == 4 * sum(p.numel() for p in held)
    for recompute in (False, True):
        leaf = torch.zeros(2, *model.network.latent_shape(None, None)).requires_grad_()
        with meter.SavedBytes([*decoder.parameters(), leaf]) as kept:
            decoder.decode(leaf, recompute=recompute)
        assert found.decoder[recompute].saved(2) == pytest.approx(kept.total, rel=0.02)
    assert found.decoder[False].saved(1) < full.decoder[False].saved(1)
    assert found.sampling_decoder is not None
    assert found.sampling_decoder == full.sampling_decoder
    # So fewer samples may fit together than if both had the small decoder.
    calls = found.rollout.forward.each + found.embeddings
    others = (found.sampling_decoder, found.reward[True])
    each = max(calls, *(part.forward.each for part in others))
    for images in (1, 3):
        need = sum(found.weights.values()) + 16 * found.trained + images * each
        budget = Budget(int(need / 0.75) + 64 + 2**28, "cpu", "test")
        assert fitting_batch(found, budget, 8) == images
    shutil.rmtree(tiny)
    with pytest.raises(AssetError, match="no such folder"):
        measured(folder, str(tiny))


def test_the_configuration_may_leave_out_what_is_the_default(tmp_path: Path) -> None:
    folder = small_pipeline(tmp_path / "model")
    tiny = small_tiny(tmp_path / "tiny")
    file = tiny / "config.json"
    values = json.loads(file.read_text())
    for key in ("latent_channels", "out_channels", "upsampling_scaling_factor"):
        del values[key]
    file.write_text(json.dumps(values))
    assert loaded(folder, str(tiny))[1].decode(torch.zeros(1, 4, 2, 2)).shape == (1, 3, 4, 4)
