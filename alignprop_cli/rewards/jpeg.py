"""How many bytes an image takes as a JPEG file: a differentiable estimate, and the true size.

The entropy coder that writes the file has no gradient. Two differentiable measures replace it:

  size        the number of bits that the coefficients of the cosine transform need (the default)
  round_trip  the error of a differentiable JPEG codec, as in DRaFT

Spearman's rank correlation with the true size (Pillow, quality 95), over 200 synthetic images of
64 x 64 and 200 of 256 x 192: flat shapes with noise, colour ramps, stripes and checks, 1/f noise,
blurred noise. (tests/rewards/test_jpeg.py repeats it on 40 of 64 x 48: 0.995 and 0.910.)

  size, quality 95        0.996  0.997
  size, quality 80        0.975  0.985
  round_trip, quality 80  0.782  0.840
  round_trip, quality 95  0.749  0.797
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from alignprop_cli.errors import AssetError, ConfigError, did_you_mean
from alignprop_cli.images import to_uint8
from alignprop_cli.rewards.base import without_autocast
from alignprop_cli.rewards.frozen import MetaReward

_QUALITY = {"size": 95, "round_trip": 80}
"""Quality that each measure is published with: DDPO's and DRaFT's."""


class Compressibility:
    """Minus the size of an image as a JPEG file, so that smaller files score higher.

    `size` is minus `estimated_kilobytes`: DDPO's reward with an estimate instead of the file, in kB
    of 1000 bytes, at most about -0.63. `round_trip` is minus the mean squared error of kornia's
    differentiable codec, at most 0. Both are highest for a flat image, which is where a model that
    only maximises them ends.

    Args:
        measure: `size` or `round_trip`.
        quality: JPEG quality, 1 to 100. None is 95 for `size` and 80 for `round_trip`.

    Raises:
        ConfigError: If the measure is unknown or the quality out of range.
        AssetError: If `round_trip` is asked for and kornia is not installed.

    Source: Black et al. 2023, arXiv:2305.13301 (size at quality 95); Clark et al. 2023,
        arXiv:2309.17400 (round trip); the codec is Shin & Song's, in kornia.
    """

    _name = "compressibility"

    def __init__(self, measure: str = "size", quality: int | None = None) -> None:
        self._size = _measure(self._name, measure, quality)
        self.extra_metrics = {"jpeg_kilobytes": true_size}

    @classmethod
    def on_meta(
        cls, dtype: torch.dtype, measure: str = "size", quality: int | None = None
    ) -> MetaReward | None:
        """Return the measure itself, which has no weights; see `FrozenReward`."""
        if measure == "round_trip":
            return None  # kornia reads values, which tensors on the meta device do not have
        return MetaReward(_measure(cls._name, measure, quality))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return minus the size or the error, shape (B,). Differentiable in images."""
        return -self._size(images)


class Incompressibility(Compressibility):
    """The size of an image as a JPEG file, so that larger files score higher.

    Minus `Compressibility`, with its arguments and errors. Noise at full contrast scores highest.
    An exactly flat image is the minimum and so has no gradient.
    """

    _name = "incompressibility"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the size or the error, shape (B,). Differentiable in images."""
        return self._size(images)


def _measure(reward: str, measure: str, quality: int | None) -> Callable[[Tensor], Tensor]:
    """Return the measure as a function from images (B, 3, H, W) to (B,), lower for smaller."""
    if measure not in _QUALITY:
        nearest = did_you_mean(measure, _QUALITY)
        raise ConfigError(f"reward.{reward}.measure: unknown measure '{measure}'.{nearest}")
    quality = _QUALITY[measure] if quality is None else quality
    if not 1 <= quality <= 100:
        raise ConfigError(f"reward.{reward}.quality: expected 1 to 100, got {quality}")
    if measure == "size":
        return lambda images: estimated_kilobytes(images, quality)
    try:
        from kornia.enhance import jpeg_codec_differentiable
    except ImportError as error:
        raise AssetError(
            f"reward.{reward}.measure: round_trip needs kornia",
            hint="pip install 'alignprop[jpeg]', or use the measure size, which needs nothing",
        ) from error

    def error_of(images: Tensor) -> Tensor:
        images = images if images.dtype == torch.float64 else images.float()
        # A tensor of one value for the whole batch: kornia takes no plain number.
        at = torch.tensor([float(quality)], dtype=images.dtype, device=images.device)
        return (images - jpeg_codec_differentiable(images, at)).square().mean(dim=(1, 2, 3))

    return error_of


def true_size(images: Tensor) -> Tensor:
    """Return the true size of the files as in DDPO: at quality 95, whatever the reward uses."""
    return jpeg_kilobytes(to_uint8(images))


def jpeg_kilobytes(images_uint8: Tensor, quality: int = 95) -> Tensor:
    """Return the true size of each image as a JPEG file.

    Args:
        images_uint8: Shape (B, H, W, 3), uint8, as `images.to_uint8` makes them.
        quality: JPEG quality, 1 to 100; 95 is DDPO's.

    Returns:
        Shape (B,), float32, in kB of 1000 bytes, on the CPU. Not differentiable.

    Source: kvablack/ddpo-pytorch, rewards.py.
    """
    images = [Image.fromarray(array) for array in images_uint8.cpu().numpy()]
    sizes = [len(_jpeg(image, quality)) for image in images]
    return torch.tensor(sizes, dtype=torch.float32) / 1000.0


def estimated_kilobytes(images: Tensor, quality: int = 95) -> Tensor:
    """Estimate the size of each image as a JPEG file with chroma at half resolution.

    bytes = header + (32 M + 2 sum_c log2(1 + 2 |c|)) / 8

    M is the number of 16 x 16 blocks, and a flat one takes 32 bits. c runs over the coefficients
    that JPEG codes: for each 8 x 8 block the 63 that are not its mean, and the differences between
    the means of neighbouring blocks. A coefficient is c = (cosine transform) / (step of the
    quantisation table), not rounded. Half of its 2 log2(1 + 2 |c|) bits are for the magnitude, of
    which JPEG writes log2 |c| bits; the other half are for the Huffman code before it. |c| is
    smoothed to sqrt(c^2 + e^2) - e with e = 0.1, so that the gradient is continuous at 0, near
    which most coefficients of a smooth image lie.

    On the images at the top of this file the median error of the estimate is 2.4 % (64 x 64) and
    3.8 % (256 x 192), the largest 36 %. Only the factors 2 and e were chosen with these images.

    Args:
        images: Shape (B, 3, H, W), float32 or float64, in [0, 1], any H and W.
        quality: JPEG quality, 1 to 100.

    Returns:
        Shape (B,), float32 or float64, in kB of 1000 bytes. Differentiable in images.
    """
    images = images if images.dtype == torch.float64 else images.float()
    with without_autocast(images.device):
        planes = _planes(images)
        bits = torch.zeros(len(images), dtype=images.dtype, device=images.device)
        for plane, table in zip(planes, _tables(quality), strict=True):
            step = torch.tensor(table, dtype=images.dtype, device=images.device)
            coefficients = _transform(plane) / step.view(8, 8)  # (B, C, rows, columns, 8, 8)
            # JPEG codes the mean of a block as its difference from that of the block to the left.
            means = coefficients[..., 0, 0].diff(dim=-1)
            bits = bits + _bits(coefficients.flatten(-2)[..., 1:]).flatten(1).sum(dim=1)
            bits = bits + _bits(means).flatten(1).sum(dim=1)
    # M: luma is at full resolution, so 256 of its values are one 16 x 16 block.
    blocks = planes[0].shape[-2] * planes[0].shape[-1] // 256
    return (_HEADER_BYTES + (_FLAT_BITS * blocks + bits) / 8.0) / 1000.0


# Bytes of markers and tables in a colour JPEG that Pillow writes with the standard Huffman tables.
_HEADER_BYTES = 623
# Bits of a flat 16 x 16 block: 2 (mean unchanged) + 4 (end of block) for each of four luma blocks,
# 2 + 2 for each of two chroma blocks. The codes of ITU-T T.81, tables K.3 to K.6.
_FLAT_BITS = 32
# e of `estimated_kilobytes`, in steps of the quantisation table.
_SMOOTHING = 0.1


def _bits(coefficients: Tensor) -> Tensor:
    """Return the bits of each quantised coefficient, smooth at 0."""
    size = torch.sqrt(coefficients.square() + _SMOOTHING**2) - _SMOOTHING
    return 2.0 * torch.log2(1.0 + 2.0 * size)


def _planes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return luma (B, 1, H, W) and the two chromas at half size, in [0, 255], padded to blocks."""
    height, width = images.shape[-2:]
    # Like an encoder, repeat the last row and column up to whole blocks of 16 x 16: -n % 16 pixels
    # are missing.
    padded = pad(255.0 * images, (0, -width % 16, 0, -height % 16), mode="replicate")
    red, green, blue = padded.unbind(dim=1)
    # JFIF, after Rec. 601, without its offset of 128 to the chromas: it changes only the means of
    # blocks, of which only differences are coded.
    luma = 0.299 * red + 0.587 * green + 0.114 * blue  # (B, H, W)
    chroma = torch.stack([(blue - luma) / 1.772, (red - luma) / 1.402], dim=1)
    return luma[:, None], avg_pool2d(chroma, 2)  # (B, 1, H, W), (B, 2, H / 2, W / 2)


def _transform(plane: Tensor) -> Tensor:
    """Return the orthonormal 8 x 8 cosine transform (DCT-II), (B, C, H / 8, W / 8, 8, 8)."""
    batch, channels, height, width = plane.shape
    blocks = plane.view(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    # Row k of the basis is cos((2 x + 1) k pi / 16) / 2 over the pixels x, with k = 0 over sqrt(2).
    frequency = torch.arange(8, dtype=plane.dtype, device=plane.device)[:, None]
    basis = torch.cos((2.0 * frequency.T + 1.0) * frequency * (math.pi / 16.0)) / 2.0
    basis = torch.where(frequency == 0, basis / math.sqrt(2.0), basis)
    return basis @ blocks @ basis.T


def _tables(quality: int) -> tuple[list[int], list[int]]:
    """Return the 64 quantisation steps of luma and of chroma, by rows, at a quality."""
    # Read back from a file of Pillow's, so that they are the steps of the true size.
    file = io.BytesIO(_jpeg(Image.new("RGB", (8, 8)), quality))
    with Image.open(file) as image:
        tables: dict[int, list[int]] = image.quantization  # type: ignore[attr-defined]
    return tables[0], tables[1]


def _jpeg(image: Image.Image, quality: int) -> bytes:
    """Return the bytes of a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()
