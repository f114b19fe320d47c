"""Pictures: ranges, bytes, and resizing as Pillow does it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from alignprop_cli import images
from alignprop_cli.images import (
    from_decoder,
    letterbox,
    normalise,
    resize_and_crop,
    saturate,
    to_uint8,
)
from tests.factories import generator, randn


def test_saturating_clamps_and_keeps_the_gradient_that_leads_back() -> None:
    images = torch.tensor([-0.5, -0.5, 0.0, 0.3, 1.0, 1.5, 1.5], requires_grad=True)
    # Descent moves against the gradient: +1 is down, -1 is up.
    gradient = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0, -1.0])
    clamped = saturate(images)
    assert clamped.tolist() == images.detach().clamp(0.0, 1.0).tolist()
    clamped.backward(gradient)
    assert images.grad is not None
    assert images.grad.tolist() == [0.0, -1.0, 1.0, -1.0, -1.0, 1.0, 0.0]


def test_saturating_is_the_identity_inside_the_range() -> None:
    images = (0.5 + 0.1 * randn(0, 2, 3, 4, 4)).requires_grad_()
    assert torch.equal(saturate(images), images)
    assert torch.autograd.gradcheck(saturate, [images])


def test_a_white_picture_can_still_get_darker() -> None:
    # With a plain clamp the gradient would be zero.
    images = torch.full((1, 3, 2, 2), 1.2, requires_grad=True)
    saturate(images).sum().backward()
    assert images.grad is not None
    assert (images.grad == 1.0).all()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_the_decoders_range_becomes_zero_to_one(dtype: torch.dtype, expected: torch.dtype) -> None:
    decoded = torch.tensor([-3.0, -1.0, -0.5, 0.0, 1.0, 2.0], dtype=dtype)
    images = from_decoder(decoded)
    assert images.dtype == expected
    assert images.tolist() == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]


def test_every_byte_survives_the_way_to_floats_and_back() -> None:
    data = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    back = to_uint8(data.float() / 255.0)
    assert back.shape == (1, 16, 16, 3)
    assert back.dtype == torch.uint8
    assert torch.equal(back.permute(0, 3, 1, 2), data)


def test_bytes_are_rounded_and_clamped() -> None:
    values = torch.tensor([-0.1, 0.49 / 255.0, 0.51 / 255.0, 254.6 / 255.0, 1.7])
    images = values.view(1, 1, 1, 5).expand(1, 3, 1, 5).requires_grad_(False)
    assert to_uint8(images)[0, 0, :, 1].tolist() == [0, 0, 1, 255, 255]


def drawing(height: int, width: int) -> Tensor:
    """A smooth picture in [0.1, 0.9], shape (1, 3, height, width), in whole bytes."""
    y = torch.linspace(0.0, 1.0, height, dtype=torch.float64)[:, None]
    x = torch.linspace(0.0, 1.0, width, dtype=torch.float64)[None]
    waves = [torch.sin(5.0 * x + phase) * torch.cos(4.0 * y - phase) for phase in (0.0, 1.0, 2.0)]
    return ((0.5 + 0.4 * torch.stack(waves)) * 255.0).round()[None] / 255.0


def photograph(height: int, width: int) -> Tensor:
    """1/f noise, the spectrum of photographs, behind discs with hard edges; as `drawing`."""
    rng = np.random.default_rng(0)
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    spectrum = np.fft.fft2(rng.normal(size=(3, height, width)))
    noise = np.fft.ifft2(spectrum / np.maximum(frequencies, 1.0 / max(height, width))).real
    pixels = 255.0 * np.clip(0.5 + 0.18 * noise / noise.std(), 0.0, 1.0)
    image = Image.fromarray(pixels.astype(np.uint8).transpose(1, 2, 0))
    for _ in range(12):
        left, top, size = int(rng.integers(width)), int(rng.integers(height)), width // 6
        colour = tuple(rng.integers(0, 256, 3).tolist())
        ImageDraw.Draw(image).ellipse((left, top, left + size, top + size), fill=colour)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double() / 255.0


@pytest.mark.parametrize("draw", [drawing, photograph])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(64, 64, 224), (512, 768, 224), (1024, 640, 336), (97, 151, 24), (30, 45, 64)],
)
def test_resizing_is_that_of_pillow(
    draw: Callable[[int, int], Tensor], height: int, width: int, size: int
) -> None:
    images = draw(height, width)
    pillow = Image.fromarray((images[0].permute(1, 2, 0) * 255.0).round().to(torch.uint8).numpy())
    scale = size / min(height, width)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = (wide - size) // 2, (high - size) // 2
    resized = pillow.resize((wide, high), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((left, top, left + size, top + size))) / 255.0
    actual = resize_and_crop(images, size)[0].permute(1, 2, 0).numpy()
    assert actual.shape == (size, size, 3)
    # Pillow rounds to bytes: 0.25 / 255 on average, and 0.5 / 255 is the bound.
    assert np.abs(actual - expected).mean() < 0.5 / 255.0


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    images = drawing(24, 24)
    assert torch.equal(resize_and_crop(images, 24), images)
    wide = drawing(24, 30)
    assert torch.equal(resize_and_crop(wide, 24), wide[..., 3:27])


@pytest.mark.parametrize(("height", "width"), [(9, 9), (7, 10), (4, 5)])
def test_resizing_passes_gradcheck(height: int, width: int) -> None:
    images = randn(1, 1, 3, height, width).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resize_and_crop(x, 6), [images])


def test_resizing_works_in_float32_at_least() -> None:
    images = torch.rand((1, 3, 10, 10), generator=generator(0))
    half = resize_and_crop(images.to(torch.bfloat16), 5)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, resize_and_crop(images.to(torch.bfloat16).float(), 5))


@pytest.mark.parametrize("draw", [drawing, photograph])
@pytest.mark.parametrize(
    ("height", "width", "size", "inner"),
    [
        (40, 80, 32, (16, 32)),
        (90, 31, 32, (32, 11)),
        (32, 7, 32, (32, 7)),
        (512, 768, 224, (149, 224)),
    ],
)
def test_letterboxing_shows_the_whole_picture_between_black(
    draw: Callable[[int, int], Tensor], height: int, width: int, size: int, inner: tuple[int, int]
) -> None:
    images = draw(height, width)
    boxed = letterbox(images, size)
    assert boxed.shape == (1, 3, size, size)
    top, left = (size - inner[0]) // 2, (size - inner[1]) // 2
    inside = boxed[..., top : top + inner[0], left : left + inner[1]]
    picture = Image.fromarray(to_uint8(images)[0].numpy())
    pillow = np.asarray(picture.resize(inner[::-1], Image.Resampling.BICUBIC)) / 255.0
    # Pillow rounds to bytes twice and clamps overshoot.
    found = inside[0].permute(1, 2, 0).clamp(0.0, 1.0).numpy()
    assert np.abs(found - pillow).mean() < 0.5 / 255.0
    outside = boxed.clone()
    outside[..., top : top + inner[0], left : left + inner[1]] = 0.0
    assert not outside.any()


def test_letterboxing_passes_gradcheck() -> None:
    images = randn(0, 1, 3, 9, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: letterbox(x, 6), [images])


def test_normalising_gives_each_channel_its_mean_and_deviation() -> None:
    images = randn(0, 2, 3, 4, 5)
    mean, std = (0.1, 0.2, 0.3), (1.0, 2.0, 4.0)
    found = normalise(images, mean, std)
    for channel in range(3):
        expected = (images[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(found[:, channel], expected)


@pytest.mark.parametrize("target", [(7, 9), (31, 16), (16, 40)])
def test_resizing_by_products_is_torchs_own_resizing(target: tuple[int, int]) -> None:
    given = randn(0, 2, 3, 16, 20).requires_grad_()
    weight = randn(1, 2, 3, *target)
    own = images._bicubic_by_products(given, target)
    (gradient,) = torch.autograd.grad((own * weight).sum(), given)
    torchs = torch.nn.functional.interpolate(given, target, mode="bicubic", antialias=True)
    (expected,) = torch.autograd.grad((torchs * weight).sum(), given)
    torch.testing.assert_close(own, torchs, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=0.0, atol=1e-12)
