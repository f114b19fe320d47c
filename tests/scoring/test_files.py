"""Image files are found and decoded as people see them; the texts in them are read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alignprop_cli.errors import AssetError
from alignprop_cli.scoring.files import Found, find_images, read_image
from tests.factories import picture


def test_folders_are_searched_and_no_image_comes_twice(tmp_path):
    for name in ("b.png", "sub/a.png", "sub/C.PNG", "notes.txt"):
        picture(tmp_path / name)
    found = find_images([str(tmp_path), str(tmp_path / "b.png")])
    names = [f.path.relative_to(tmp_path).as_posix() for f in found]
    assert names == ["b.png", "sub/C.PNG", "sub/a.png"]
    assert {f.root for f in found} == {tmp_path}
    assert find_images([str(tmp_path / "notes.txt")]) == [Found(tmp_path / "notes.txt", tmp_path)]
    with pytest.raises(AssetError, match="no such file"):
        find_images([str(tmp_path / "none")])


def test_what_a_folder_hides_is_among_its_images_so_that_it_is_counted(tmp_path, monkeypatch):
    picture(tmp_path / "b.png")
    picture(tmp_path / "closed" / "x.png")
    # As those of a data set whose files were not fetched.
    (tmp_path / "a.png").symlink_to("nowhere")
    (tmp_path / "notes.txt").symlink_to("nowhere")
    scan = os.scandir

    def refuse(place):
        if Path(place) == tmp_path / "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return scan(place)

    # Root may read everything, so that a test cannot close a folder.
    monkeypatch.setattr(os, "scandir", refuse)
    found = find_images([str(tmp_path)])
    assert [f.path for f in found] == [tmp_path / n for n in ("a.png", "b.png", "closed")]
    for hidden in (found[0], found[2]):
        with pytest.raises(ValueError, match=hidden.path.name):
            read_image(hidden.path)


def test_a_pattern_counts_the_folders_that_it_could_not_look_into(tmp_path, monkeypatch):
    for name in ("b.png", "sub/a.png"):
        picture(tmp_path / name)
    # Empty: the glob of Python 3.13 takes `scandir` before a test can replace it.
    for name in ("closed", "sub/closed"):
        (tmp_path / name).mkdir()
    (tmp_path / "sub" / "round").symlink_to("..")
    scan, looked = os.scandir, list[str]()

    def refuse(place):
        looked.append(str(place))
        if Path(place).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", refuse)

    def found(pattern: str) -> list[str]:
        images = find_images([str(tmp_path / pattern)])
        return [f.path.relative_to(tmp_path).as_posix() for f in images]

    assert found("**/*.png") == ["b.png", "closed", "sub/a.png", "sub/closed"]
    assert found("s*/**/*.png") == ["sub/a.png", "sub/closed"]
    assert found("*/*.png") == ["closed", "sub/a.png"]
    # What it would not look into is not looked into, and is not its concern.
    looked.clear()
    assert found("*.png") == ["b.png"]
    assert {Path(place) for place in looked} == {tmp_path}
    # As for a folder that is named: what cannot be read at all is an error.
    with pytest.raises(AssetError, match="cannot be read: Permission denied"):
        find_images([str(tmp_path / "closed" / "*.png")])
    with pytest.raises(AssetError, match="no such file or folder, and no pattern"):
        find_images([str(tmp_path / "none" / "*.png")])


def test_transparent_parts_become_white(tmp_path):
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    image.save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png").pixels
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() == [127, 127, 127]
    assert pixels[1, 3].tolist() == [255, 0, 0]
    image.quantize().save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").pixels[0, 0].tolist() == [255, 255, 255]


def test_images_are_turned_as_their_camera_says(tmp_path):
    image = Image.new("RGB", (6, 4), "black")
    image.paste((255, 255, 255), (0, 0, 3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels = read_image(tmp_path / "a.jpg").pixels
    assert pixels.shape == (6, 4, 3)
    assert pixels[0].min() > 200
    assert pixels[-1].max() < 50


def test_sixteen_bits_and_cmyk_keep_their_brightness(tmp_path):
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").pixels[0, 0].tolist() == [128, 128, 128]
    Image.new("CMYK", (8, 8), (0, 0, 0, 128)).save(tmp_path / "print.jpg", quality=95)
    pixels = read_image(tmp_path / "print.jpg").pixels
    assert abs(int(pixels[4, 4, 0]) - 127) < 4


def test_files_that_cannot_be_measured_say_why(tmp_path):
    whole = picture(tmp_path / "a.png", size=(64, 64)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    for name in ("cut.png", "text.png", "empty.png"):
        with pytest.raises(ValueError, match=r"\w"):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match="animated, 2 frames"):
        read_image(tmp_path / "moving.webp")


def test_a_image_too_large_to_be_one_is_refused(tmp_path, monkeypatch):
    path = picture(tmp_path / "a.png", size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="decompression bomb"):
        read_image(path)


def test_patterns_are_filled_in_but_a_name_comes_before_a_pattern(tmp_path, monkeypatch):
    for name in ("a1.png", "a2.png", "sub/deep/a3.png", "cat[1].png", "b.png"):
        picture(tmp_path / name)
    monkeypatch.chdir(tmp_path)

    def names(*patterns):
        return [f.path.as_posix() for f in find_images(patterns)]

    assert names("a?.png") == ["a1.png", "a2.png"]
    assert names("**/a*.png") == ["a1.png", "a2.png", "sub/deep/a3.png"]
    assert names(str(tmp_path / "s*" / "deep")) == [str(tmp_path / "sub/deep/a3.png")]
    assert names("cat[1].png") == ["cat[1].png"]
    with pytest.raises(AssetError, match="no pattern that matches"):
        names("c?.png")


def test_the_digest_is_of_what_is_seen(tmp_path):
    same = [picture(tmp_path / "a.png", 100), picture(tmp_path / "b.bmp", 100, prompt="x")]
    other = [picture(tmp_path / "c.png", 101), picture(tmp_path / "d.png", 100, (4, 16))]
    digests = [read_image(path).digest() for path in (*same, *other)]
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
    assert read_image(tmp_path / name).texts.get("UserComment") == text


def test_linked_files_keep_their_own_names(tmp_path):
    blob = picture(tmp_path / "blobs" / "abc")
    (tmp_path / "snapshot").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "snapshot" / name).symlink_to(blob)
    found = find_images([str(tmp_path / "snapshot"), str(tmp_path / "snapshot" / "a.png")])
    assert [f.path.name for f in found] == ["a.png", "b.png"]


def test_a_pattern_searches_from_its_fixed_folder_and_takes_images_alone(tmp_path):
    picture(tmp_path / "out" / "sub" / "a.png")
    (tmp_path / "out" / "sub" / "a.txt").write_text("a cat")
    (found,) = find_images([str(tmp_path / "out" / "**" / "*")])
    assert found == Found(tmp_path / "out" / "sub" / "a.png", tmp_path / "out")


def test_a_name_that_begins_like_a_home_folder_is_a_name(tmp_path, monkeypatch):
    picture(tmp_path / "~nobody-here.png")
    monkeypatch.chdir(tmp_path)
    assert len(find_images(["~nobody-here.png"])) == 1


def test_other_kinds_of_files_are_not_handed_to_other_programs(tmp_path):
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EOF\n")
    with pytest.raises(ValueError, match="cannot identify"):
        read_image(tmp_path / "a.png")


def test_a_photograph_with_a_preview_is_read_and_a_strip_is_not(tmp_path):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (4, 4))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert read_image(tmp_path / "a.jpg").pixels.shape == (8, 8, 3)
    Image.new("RGB", (1, 400)).save(tmp_path / "strip.png")
    with pytest.raises(ValueError, match="1 x 400 px"):
        read_image(tmp_path / "strip.png")


@pytest.mark.filterwarnings("ignore:.*:Warning:PIL")
def test_no_damage_makes_reading_fail_in_another_way(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a"
    for suffix in ("png", "jpg", "webp", "bmp", "tiff", "gif"):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(rng.integers(0, 255, (9, 7, 3), dtype=np.uint8)).save(
            tmp_path / f"whole.{suffix}", exif=exif
        )
        whole = np.frombuffer((tmp_path / f"whole.{suffix}").read_bytes(), np.uint8)
        outcomes = set()
        for _ in range(60):
            damaged = whole.copy()
            damaged[rng.integers(len(whole), size=4)] = rng.integers(0, 255, 4)
            path.write_bytes(damaged.tobytes())
            try:
                outcomes.add(read_image(path).pixels.ndim)
            except ValueError as error:
                outcomes.add(str(error) != "")
        assert outcomes <= {3, True}
