"""The autoencoder of Qwen-Image: one frame of a video, without the clamp of diffusers' decode."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.errors import ConfigError
from alignprop_cli.models import components
from alignprop_cli.models.base import Source
from alignprop_cli.models.qwen_vae import VAE, QwenDecoder, check_vae
from alignprop_cli.planning import meter
from tests.factories import randn
from tests.flow_models import small_qwen_vae

SHAPE = (2, 4, 8, 6)


@pytest.fixture
def vae() -> Any:
    """Return an autoencoder in float64, about half of whose pixels leave the range."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = small_qwen_vae().double()
    made.decoder.conv_out.weight.data.mul_(3.0)
    return made


@pytest.fixture
def decoder(vae: Any) -> QwenDecoder:
    return QwenDecoder(deepcopy(vae), None, "name")


def by_diffusers(vae: Any, latents: Tensor) -> Tensor:
    """Return images in [0, 1], by the lines of QwenImagePipeline."""
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents.dtype)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents.dtype)
    frames = vae.decode(latents.unsqueeze(2) / std + mean, return_dict=False)[0]
    return frames[:, :, 0] / 2.0 + 0.5


def test_images_are_those_of_diffusers_decode(vae: Any, decoder: QwenDecoder) -> None:
    latents = randn(1, *SHAPE)
    with torch.no_grad():
        expected, found = by_diffusers(vae, latents), decoder.decode(latents)
    assert found.shape == (2, 3, 16, 12)
    # diffusers has the configuration's numbers in float32.
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-6)
    # Both clamp, so that neither is the other by accident.
    saturated = ((found == 0.0) | (found == 1.0)).double().mean()
    assert 0.1 < float(saturated) < 0.9


def test_the_gradient_is_that_of_diffusers_and_more_where_it_leads_back(
    vae: Any, decoder: QwenDecoder
) -> None:
    latents = randn(1, *SHAPE).requires_grad_()
    images = decoder.decode(latents)
    white = images.detach() == 1.0
    inside = (images.detach() > 0.0) & (images.detach() < 1.0)
    assert 0.1 < float(white.double().mean()) < 0.9

    def gradient(pixels: Tensor) -> Tensor:
        return torch.autograd.grad(pixels.sum(), [latents], retain_graph=True)[0]

    theirs = by_diffusers(vae, latents)
    torch.testing.assert_close(
        gradient(images * inside), gradient(theirs * inside), rtol=1e-5, atol=1e-8
    )
    # Less light in the white pixels alone, and more of it: the first leads back into the range.
    assert float(gradient(images * white).norm()) > 1e-2
    assert float(gradient(-images * white).norm()) == 0.0
    # The clamp of diffusers' own decode leaves no gradient at all.
    assert float(gradient(theirs * white).norm()) == 0.0


def test_the_decoders_parameters_are_those_that_get_a_gradient(decoder: QwenDecoder) -> None:
    decoder.module.requires_grad_(True)
    decoder.decode(randn(1, *SHAPE)).sum().backward()
    used = {id(p) for p in decoder.module.parameters() if p.grad is not None}
    assert {id(p) for p in decoder.parameters()} == used


def test_less_is_stored_than_by_diffusers_which_sees_the_zeros_before_the_frame(
    vae: Any, decoder: QwenDecoder
) -> None:
    stored: list[int] = []
    for module, decode in ((vae, lambda x: by_diffusers(vae, x)), (decoder.module, decoder.decode)):
        with meter.SavedBytes(module.parameters()) as saved:
            images = decode(randn(1, *SHAPE).requires_grad_())
        assert images.requires_grad
        stored.append(saved.total)
        saved.release()
    assert stored[1] < 0.8 * stored[0]
    # The names of the weights stay.
    assert decoder.module.state_dict().keys() == vae.state_dict().keys()


def test_recomputed_blocks_give_the_same_images_and_gradient(decoder: QwenDecoder) -> None:
    latents = randn(1, *SHAPE).requires_grad_()
    found: list[Tensor] = []
    for recompute in (False, True):
        images = decoder.decode(latents, recompute=recompute)
        found += [images, *torch.autograd.grad((images * randn(2, *images.shape)).sum(), [latents])]
    assert torch.equal(found[0], found[2])
    assert float(found[1].norm()) > 1e-2
    torch.testing.assert_close(found[3], found[1], rtol=1e-10, atol=1e-12)


def test_tiles_are_those_of_diffusers(vae: Any) -> None:
    latents, config = randn(1, 1, 4, 12, 20), vae.config
    (whole, in_tiles, small) = (
        QwenDecoder(deepcopy(vae), size, "name").decode(latents[..., :8] if size == 16 else latents)
        for size in (None, 16, 40)
    )
    assert torch.equal(small, whole)  # a single tile
    vae.enable_tiling(16, 16, 12, 12)
    frames = latents[..., :8].unsqueeze(2)
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    with torch.no_grad():
        expected = vae.decode(frames * std + mean, return_dict=False)[0][:, :, 0] / 2.0 + 0.5
    torch.testing.assert_close(in_tiles, expected.clamp(0.0, 1.0), rtol=0.0, atol=1e-6)
    assert float((in_tiles - whole[..., :16]).abs().mean()) > 1e-4
    with pytest.raises(ConfigError, match="vae_tile_size: 12 is not a multiple of 8, which name"):
        QwenDecoder(vae, 12, "name")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "AutoencoderKLWan"}, "_class_name: expected AutoencoderKLQwenImage"),
        ({"input_channels": 4}, "input_channels: expected 3, got 4"),
        ({"latents_std": [0.0]}, "latents_std: expected a list, each a number between 0 and inf"),
        ({"latents_std": [1.0] * 3}, "latents_std: expected 4 values, got [1.0, 1.0, 1.0]"),
        ({"latents_mean": [0.0] * 5}, "latents_mean: expected 4 values"),
        ({"dim_mult": [1, 2, 4]}, "temperal_downsample: expected 2 values, got [True]"),
    ],
)
def test_configurations_that_are_not_obeyed_are_refused(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "vae"
    small_qwen_vae().save_config(folder)
    file = folder / "config.json"
    source = Source(ModelConfig(id=str(tmp_path)), tmp_path, torch.float32)

    def check() -> None:
        components.check(tmp_path, {"vae": VAE})
        check_vae(source)

    check()
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(ConfigError) as caught:
        check()
    assert message in caught.value.message
