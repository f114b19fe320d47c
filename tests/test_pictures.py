"""Picture files are found and decoded as people see them; what they carry is read."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from alignprop_cli.errors import AssetError
from alignprop_cli.pictures import Found, find_pictures, read_picture
from tests.factories import picture


def test_folders_are_searched_and_no_picture_comes_twice(tmp_path):
    for name in ("b.png", "sub/a.png", "sub/C.PNG", "notes.txt"):
        picture(tmp_path / name)
    found = find_pictures([str(tmp_path), str(tmp_path / "b.png")])
    names = [f.path.relative_to(tmp_path).as_posix() for f in found]
    assert names == ["b.png", "sub/C.PNG", "sub/a.png"]
    assert {f.root for f in found} == {tmp_path}
    assert find_pictures([str(tmp_path / "notes.txt")]) == [Found(tmp_path / "notes.txt", tmp_path)]
    with pytest.raises(AssetError, match="no such file"):
        find_pictures([str(tmp_path / "none")])


def test_transparent_parts_become_white(tmp_path):
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    image.save(tmp_path / "a.png")
    pixels = read_picture(tmp_path / "a.png").pixels
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() == [127, 127, 127]
    assert pixels[1, 3].tolist() == [255, 0, 0]
    image.quantize().save(tmp_path / "palette.png")
    assert read_picture(tmp_path / "palette.png").pixels[0, 0].tolist() == [255, 255, 255]


def test_pictures_are_turned_as_their_camera_says(tmp_path):
    image = Image.new("RGB", (6, 4), "black")
    image.paste((255, 255, 255), (0, 0, 3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels = read_picture(tmp_path / "a.jpg").pixels
    assert pixels.shape == (6, 4, 3)
    assert pixels[0].min() > 200
    assert pixels[-1].max() < 50


def test_sixteen_bits_and_cmyk_keep_their_brightness(tmp_path):
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png").pixels[0, 0].tolist() == [128, 128, 128]
    Image.new("CMYK", (8, 8), (0, 0, 0, 128)).save(tmp_path / "print.jpg", quality=95)
    pixels = read_picture(tmp_path / "print.jpg").pixels
    assert abs(int(pixels[4, 4, 0]) - 127) < 4


def test_files_that_cannot_be_measured_say_why(tmp_path):
    whole = picture(tmp_path / "a.png", size=(64, 64)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    for name in ("cut.png", "text.png", "empty.png"):
        with pytest.raises(ValueError, match=r"\w"):
            read_picture(tmp_path / name)
    with pytest.raises(ValueError, match="animated, 2 frames"):
        read_picture(tmp_path / "moving.webp")


def test_a_picture_too_large_to_be_one_is_refused(tmp_path, monkeypatch):
    path = picture(tmp_path / "a.png", size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="decompression bomb"):
        read_picture(path)


def test_patterns_are_filled_in_but_a_name_comes_before_a_pattern(tmp_path, monkeypatch):
    for name in ("a1.png", "a2.png", "sub/deep/a3.png", "cat[1].png", "b.png"):
        picture(tmp_path / name)
    monkeypatch.chdir(tmp_path)

    def names(*patterns):
        return [f.path.as_posix() for f in find_pictures(patterns)]

    assert names("a?.png") == ["a1.png", "a2.png"]
    assert names("**/a*.png") == ["a1.png", "a2.png", "sub/deep/a3.png"]
    assert names(str(tmp_path / "s*" / "deep")) == [str(tmp_path / "sub/deep/a3.png")]
    assert names("cat[1].png") == ["cat[1].png"]
    with pytest.raises(AssetError, match="no pattern that fits"):
        names("c?.png")


def test_the_digest_is_of_what_is_seen(tmp_path):
    same = [picture(tmp_path / "a.png", 100), picture(tmp_path / "b.bmp", 100, prompt="x")]
    other = [picture(tmp_path / "c.png", 101), picture(tmp_path / "d.png", 100, (4, 16))]
    digests = [read_picture(path).digest() for path in (*same, *other)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("comment", "text"),
    [
        (b"UNICODE\0" + "ein Bär".encode("utf-16-be"), "ein Bär"),
        (b"UNICODE\0" + "a cat".encode("utf-16-le"), "a cat"),
        (b"ASCII\0\0\0a cat\0", "a cat"),
        (b"\0" * 8 + b"a cat", "a cat"),
        (b"JIS\0\0\0\0\0abc", None),
    ],
)
@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_the_comment_of_exif_is_read_in_its_code(tmp_path, name, comment, text):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    Image.new("RGB", (4, 4)).save(tmp_path / name, exif=exif)
    assert read_picture(tmp_path / name).texts.get("UserComment") == text
