"""Pictures from files are found, decoded as people see them, and matched with their prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from alignprop_cli.config import LossConfig, RewardConfig
from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.report import save_picture
from alignprop_cli.rewards.composite import Member, Mixture, build_mixture
from alignprop_cli.scorer import (
    Found,
    PromptFinder,
    Scored,
    Skipped,
    find_pictures,
    needs_prompt,
    read_picture,
    read_table,
    score,
)

CPU = torch.device("cpu")


def picture(path, value=100, size=(8, 8), **texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(np.full((*size, 3), value, dtype=np.uint8), path, texts)
    return path


def mixture(*names):
    return build_mixture({name: RewardConfig() for name in names}, LossConfig(), CPU)


def prompt_of(path, root=None, **options):
    _, texts = read_picture(path)
    return PromptFinder(**options).find(Found(path, root or path.parent), texts)


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
    pixels, _ = read_picture(tmp_path / "a.png")
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() == [127, 127, 127]
    assert pixels[1, 3].tolist() == [255, 0, 0]
    image.quantize().save(tmp_path / "palette.png")
    assert read_picture(tmp_path / "palette.png")[0][0, 0].tolist() == [255, 255, 255]


def test_pictures_are_turned_as_their_camera_says(tmp_path):
    image = Image.new("RGB", (6, 4), "black")
    image.paste((255, 255, 255), (0, 0, 3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels, _ = read_picture(tmp_path / "a.jpg")
    assert pixels.shape == (6, 4, 3)
    assert pixels[0].min() > 200
    assert pixels[-1].max() < 50


def test_sixteen_bits_and_cmyk_keep_their_brightness(tmp_path):
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png")[0][0, 0].tolist() == [128, 128, 128]
    Image.new("CMYK", (8, 8), (0, 0, 0, 128)).save(tmp_path / "print.jpg", quality=95)
    pixels, _ = read_picture(tmp_path / "print.jpg")
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


def test_prompts_come_from_the_first_source_that_has_one(tmp_path):
    path = picture(tmp_path / "sub" / "a.png", prompt="own")
    table = tmp_path / "prompts.csv"
    assert prompt_of(path) == ("own", "picture")
    path.with_suffix(".txt").write_text("beside\n")
    assert prompt_of(path) == ("beside", "sidecar")
    (tmp_path / "metadata.jsonl").write_text(
        '\n{"file_name": "sub/a.png", "text": "of the folder\\u2028", "other": 1}\n'
    )
    assert prompt_of(path) == ("beside", "sidecar")
    assert prompt_of(path, tmp_path) == ("of the folder\u2028", "metadata")
    (path.parent / "metadata.csv").write_text('file_name,caption\na.png,"nearer, and quoted"\n')
    assert prompt_of(path, tmp_path) == ("nearer, and quoted", "metadata")
    table.write_text("file_name,prompt\nsub/a.png,from the file\n")
    assert prompt_of(path, table=table) == ("from the file", "file")
    assert prompt_of(path, table=table, prompt="flag") == ("flag", "flag")


def test_a_table_does_not_answer_for_files_of_the_same_name_elsewhere(tmp_path):
    path = picture(tmp_path / "sub" / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,prompt\na.png,another picture\n")
    assert prompt_of(path, tmp_path) == (None, "none")


def test_the_graph_of_another_program_is_no_prompt(tmp_path):
    path = picture(tmp_path / "a.png", prompt=json.dumps({"3": {"class_type": "KSampler"}}))
    assert prompt_of(path) == (None, "none")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"file_name": "a.png"', "a.jsonl:1: not JSON"),
        ("a.jsonl", '\n["a.png", "x"]', "a.jsonl:2: expected an object"),
        ("a.jsonl", '{"prompt": "x"}', "a.jsonl:1: expected file_name"),
        ("a.csv", "file,prompt\na.png,x\n", "a.csv:2: expected file_name"),
        ("a.txt", "x", "expected a .jsonl or .csv"),
    ],
)
def test_a_table_that_cannot_be_understood_names_the_line(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_table(tmp_path / name)


def test_only_rewards_of_pixels_do_without_a_prompt():
    assert not needs_prompt("brightness", {})
    assert needs_prompt("clip", {})
    assert needs_prompt("mine.py:reward", {})
    assert needs_prompt("count", {"object": "dog"})
    assert not needs_prompt("count", {"object": "dog", "number": 0})


def test_results_come_in_order_and_do_not_depend_on_the_batch(tmp_path):
    values = [10, 200, 30, 90, 250]
    for index, value in enumerate(values):
        size = (8, 8) if index != 2 else (5, 9)
        picture(tmp_path / f"{index}.png", value, size)
    (tmp_path / "1b.png").write_text("broken")
    found = find_pictures([str(tmp_path)])

    def results(batch_size):
        scored = score(
            found,
            mixture("brightness"),
            PromptFinder(),
            asking=[],
            device=CPU,
            batch_size=batch_size,
        )
        return list(scored)

    single, many = results(1), results(4)
    assert [r.path.name for r in many] == [
        "0.png",
        "1.png",
        "1b.png",
        *(f"{i}.png" for i in (2, 3, 4)),
    ]
    assert isinstance(many[2], Skipped)
    measured = [r.rewards["brightness"] for r in many if isinstance(r, Scored)]
    np.testing.assert_allclose(measured, np.array(values) / 255.0, atol=1e-6)
    again = [r.rewards["brightness"] for r in single if isinstance(r, Scored)]
    np.testing.assert_allclose(again, measured, atol=1e-6)


def test_a_picture_without_a_prompt_is_skipped_where_a_reward_needs_one(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", prompt="four")
    lengths = Member(
        "length",
        lambda images, prompts: torch.tensor([float(len(p)) for p in prompts]),
        1.0,
        LossConfig(),
    )
    found = find_pictures([str(tmp_path)])
    first, second = score(
        found, Mixture([lengths]), PromptFinder(), asking=["length"], device=CPU, batch_size=4
    )
    assert first == Skipped(tmp_path / "a.png", "no prompt found, which length needs")
    assert second == Scored(tmp_path / "b.png", "four", "picture", {"length": 4.0})
