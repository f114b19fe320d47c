"""Every mode of pixels becomes the bytes that people see, or the image is refused."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from packaging.version import Version
from PIL import Image

from alignprop_cli.scoring import pixels
from alignprop_cli.scoring.files import FIRST_FRAME, SCALED, read_image

HANDED = Path(os.environ.get("ALIGNPROP_CASES", Path(__file__).parents[3] / "shared" / "cases"))


def first(path):
    return read_image(path).pixels[0, 0].tolist()


def tiff(path, values, *, bits, photometric=1, sample_format=1, samples=1):
    """Write an uncompressed little-endian TIFF from its raw bytes, shape (H, W)."""
    height, width, data = values
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, bits),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, 8),
        (277, 3, 1, samples),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
        (339, 3, 1, sample_format),
    ]
    directory = struct.pack("<H", len(tags))
    for tag, kind, count, value in tags:
        directory += struct.pack("<HHI", tag, kind, count)
        directory += struct.pack(
            "<HH" if kind == 3 else "<I", *((value, 0) if kind == 3 else (value,))
        )
    directory += struct.pack("<I", 0)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory)
    return path


def test_the_handed_float_image_is_half_bright():
    path = HANDED / "pictures" / "float01.tif"
    if not path.is_file():
        pytest.skip(f"{path} is not here; set ALIGNPROP_CASES to the folder of cases")
    assert read_image(path).pixels.mean() / 255 == pytest.approx(0.5, abs=1e-3)


def test_floats_in_zero_to_one_are_scaled_and_others_refused(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.float32([[0.2, 1.0], [0.0, 0.6]])).save(path)
    assert read_image(path).pixels[..., 0].tolist() == [[51, 255], [0, 153]]
    for values in ([[0.0, 255.0]], [[-0.1, 0.5]], [[0.5, float("nan")]], [[0.0, float("inf")]]):
        Image.fromarray(np.float32(values)).save(path)
        with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
            read_image(path)


def test_sixteen_bits_are_scaled_from_their_whole_range(tmp_path):
    # 65535 = 257 x 255
    grey = np.uint16([[0, 257 * 100, 65535]])
    for name in ("a.png", "a.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        assert read_image(tmp_path / name).pixels[0, :, 1].tolist() == [0, 100, 255]
    data = (1, 3, grey.astype("<u2").tobytes())
    assert first(tiff(tmp_path / "b.tif", data, bits=16, photometric=0)) == [255, 255, 255]


def test_twelve_bits_are_scaled_from_twelve(tmp_path):
    # Two values of 12 bits in three bytes: 4095, and 0x7f8 = 2040, 2040 / 4095 x 255 = 127.03
    path = tiff(tmp_path / "a.tif", (1, 2, bytes([0xFF, 0xF7, 0xF8])), bits=12)
    assert read_image(path).pixels[0, :, 0].tolist() == [255, 127]


def test_a_grey_value_may_stand_for_transparent_in_sixteen_bits(tmp_path):
    Image.fromarray(np.uint16([[5, 257]])).save(tmp_path / "a.png", transparency=5)
    assert read_image(tmp_path / "a.png").pixels[0, :, 0].tolist() == [255, 1]


def png(path, depth, colour, raw):
    """Write a PNG of one row from its raw bytes."""
    width = len(raw) * 8 // (depth * {0: 1, 2: 3, 4: 2, 6: 4}[colour])

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" + raw))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b""))
    return path


def test_sixteen_bits_of_colour_keep_their_brightness(tmp_path):
    rgb = struct.pack(">3H", 257 * 200, 257 * 100, 257 * 3)
    assert first(png(tmp_path / "a.png", 16, 2, rgb)) == [200, 100, 3]
    # Half transparent over white: 100 x 128/255 + 255 x 127/255 = 177.2
    rgba = struct.pack(">4H", *[257 * 100] * 3, 257 * 128)
    assert first(png(tmp_path / "b.png", 16, 6, rgba)) == [177, 177, 177]
    grey = struct.pack(">2H", 257 * 100, 257 * 128)
    assert first(png(tmp_path / "c.png", 16, 4, grey)) == [177, 177, 177]


def test_integers_that_do_not_tell_white_are_refused(tmp_path):
    Image.fromarray(np.int32([[0, 70000]])).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="do not tell which value is white"):
        read_image(tmp_path / "a.tif")
    data = (1, 2, np.int16([-5, 5]).astype("<i2").tobytes())
    with pytest.raises(ValueError, match="signed integers"):
        read_image(tiff(tmp_path / "b.tif", data, bits=16, sample_format=2))
    data = (1, 2, np.int8([-5, 5]).tobytes())
    with pytest.raises(ValueError, match="signed integers"):
        read_image(tiff(tmp_path / "c.tif", data, bits=8, sample_format=2))
    Image.new("LAB", (2, 2)).save(tmp_path / "d.tif")
    with pytest.raises(ValueError, match="LAB"):
        read_image(tmp_path / "d.tif")


def test_bytes_of_every_mode_become_what_people_see(tmp_path):
    def saved(name, image, **options):
        image.save(tmp_path / name, **options)
        return first(tmp_path / name)

    assert saved("1.png", Image.new("1", (4, 4), 1)) == [255, 255, 255]
    # Grey 100 with half its cover, as above.
    assert saved("la.png", Image.new("LA", (4, 4), (100, 128))) == [177, 177, 177]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert saved("p.png", palette) == [10, 20, 30]
    assert saved("pt.png", palette, transparency=1) == [255, 255, 255]
    assert saved("pa.png", palette, transparency=bytes([255, 128])) == [132, 137, 142]
    # 255 (1 - C) (1 - K) with C = 51/255 = 0.2, K = 0.6: 81.6; the others 102
    assert saved("cmyk.tif", Image.new("CMYK", (4, 4), (51, 0, 0, 153))) == [82, 102, 102]
    # R = Y + 1.402 (Cr - 128), G = Y - 0.344 (Cb - 128) - 0.714 (Cr - 128),
    # B = Y + 1.772 (Cb - 128)
    ycbcr = Image.new("YCbCr", (4, 4), (100, 138, 118))
    if Version(PIL.__version__) >= Version("13"):
        assert saved("ycbcr.tif", ycbcr) == pytest.approx([86, 104, 118], abs=1)
    else:
        # Older versions cannot read the file that they write.
        with pytest.raises(ValueError, match="truncated"):
            saved("ycbcr.tif", ycbcr)
    white_is_zero = (1, 2, bytes([0, 255]))
    assert first(tiff(tmp_path / "w.tif", white_is_zero, bits=8, photometric=0)) == [255, 255, 255]


def test_of_an_animated_gif_the_first_frame_is_taken_and_said(tmp_path):
    frames = [Image.new("RGB", (4, 4), c) for c in ((200, 0, 0), (0, 0, 200))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    found = read_image(tmp_path / "a.gif")
    assert found.pixels[0, 0].tolist() == [200, 0, 0]
    assert found.remark == FIRST_FRAME
    frames[1].save(tmp_path / "b.gif")
    assert read_image(tmp_path / "b.gif").remark is None


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "I;16", "F", "CMYK"])
def test_a_large_image_is_the_mean_of_squares_of_its_pixels(tmp_path, monkeypatch, mode):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    monkeypatch.setattr(pixels, "_ROWS", 2)  # three stripes
    # Each pixel as a square of 3 x 3: its mean is the pixel.
    if mode in ("I;16", "F"):
        small = np.repeat(small[..., :1], 3, axis=2)
        grey = small[..., 0].repeat(3, axis=0).repeat(3, axis=1)
        values = np.uint16(grey) * 257 if mode == "I;16" else np.float32(grey) / 255
        Image.fromarray(values).save(tmp_path / "a.tif")
    else:
        image = Image.fromarray(small.repeat(3, axis=0).repeat(3, axis=1))
        if mode == "P":
            image = image.quantize()
            small = np.asarray(image.convert("RGB"))[::3, ::3]
        image.convert(mode).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif").remark is None
    monkeypatch.setattr(pixels, "MOST_PIXELS", 15 * 21 // 5)
    found = read_image(tmp_path / "a.tif")
    assert found.remark == SCALED
    np.testing.assert_array_equal(found.pixels, small)


def test_a_large_photograph_is_scaled_and_upright(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "MOST_PIXELS", 64 * 64)
    exif = Image.Exif()
    exif[0x0112] = 6
    half = Image.new("RGB", (256, 128), (200, 200, 200))
    half.paste((20, 20, 20), (128, 0, 256, 128))
    half.save(tmp_path / "a.jpg", exif=exif, quality=95)
    found = read_image(tmp_path / "a.jpg").pixels
    # 128 x 64 after reading at half size, divided by 2 again; a quarter turn clockwise
    assert found.shape == (64, 32, 3)
    assert abs(int(found[0, 0, 0]) - 200) < 3
    assert abs(int(found[-1, 0, 0]) - 20) < 3


def test_formats_that_are_read_whole_have_a_limit(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.webp")
    for module in ("alignprop_cli.scoring.pixels", "alignprop_cli.scoring.files"):
        monkeypatch.setattr(f"{module}.MOST_PIXELS", 1000)
    with pytest.raises(ValueError, match="64 x 64 px: too large for a WEBP"):
        read_image(tmp_path / "a.webp")


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux counts it")
@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("mode", ["1", pytest.param("RGBA", marks=pytest.mark.slow)])
def test_an_image_of_169_megapixels_takes_little_memory(tmp_path, mode):
    # 40 and 700 kB on the disk: PNG squeezes one colour to almost nothing.
    colour = 1 if mode == "1" else (255, 255, 255, 255)
    Image.new(mode, (13_000, 13_000), colour).save(tmp_path / "a.png", compress_level=1)
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from alignprop_cli.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        # getrusage would count what this process had when it started the other one.
        "    status = Path('/proc/self/status').read_text()\n"
        "    print(re.search(r'VmHWM:\\s*(\\d+)', status)[1], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "score", tmp_path / "a.png", "--reward", "brightness", "-q"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "1.0000" in done.stdout
    assert int(done.stderr.split()[-1]) < 2 * 2**20  # KiB
