"""Sheets have room for everything on them, and images carry what is said about them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from alignprop_cli.evaluation.sheet import Cell, contact_sheet, curves, save_image

RED = (200, 0, 0)
BLUE = (0, 0, 200)


def flat(colour, size=(16, 16)):
    return np.full((*size, 3), colour, dtype=np.uint8)


def pair(prompt="a cat", captions=("clip 0.1", "clip 0.2")):
    return Cell(prompt, (flat(RED), flat(BLUE)), captions)


def count(path, colour):
    """Return how many pixels of a sheet have this colour."""
    pixels = np.asarray(Image.open(path))
    return int((pixels == np.array(colour)).all(axis=-1).sum())


@pytest.mark.parametrize("number", [1, 3, 8])
def test_every_image_is_on_the_sheet_in_full(tmp_path, number):
    path = tmp_path / "sheet.png"
    contact_sheet([pair()] * number, path, titles=("base", "tuned"))
    assert count(path, RED) == count(path, BLUE) == number * 192 * 192


def test_a_pair_is_side_by_side_in_the_order_of_the_titles(tmp_path):
    path = tmp_path / "sheet.png"
    contact_sheet([pair()], path, titles=("base", "tuned"))
    pixels = np.asarray(Image.open(path))
    row = pixels[(pixels == np.array(RED)).all(axis=-1).any(axis=1)][0]
    red, blue = ((row == np.array(c)).all(axis=-1).nonzero()[0] for c in (RED, BLUE))
    assert red.max() < blue.min() < red.max() + 20


def test_rows_are_as_even_as_possible(tmp_path):
    single = Cell("x", (flat(RED),), ("",))
    contact_sheet([single] * 8, tmp_path / "eight.png", titles=("step 0",))
    contact_sheet([single] * 4, tmp_path / "four.png", titles=("step 0",))
    assert Image.open(tmp_path / "eight.png").width == Image.open(tmp_path / "four.png").width


@pytest.mark.parametrize(
    "prompt",
    ["", "word " * 400, "x" * 2000, "line\nbreak\ttab\0nul", "<script>alert(1)</script>", "猫 né"],
    ids=["empty", "long", "one word", "control", "markup", "unicode"],
)
def test_any_prompt_can_be_written_and_none_makes_the_sheet_huge(tmp_path, prompt):
    contact_sheet([pair(prompt, (prompt, prompt))], tmp_path / "sheet.png", titles=("a", "b"))
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width == 2 * 24 + 2 * 192 + 8
    assert height < 192 + 200


def test_text_is_drawn_under_the_images(tmp_path):
    for name, prompt in (("without", ""), ("with", "a prompt of some length")):
        contact_sheet([pair(prompt)], tmp_path / f"{name}.png", titles=("a", "b"))
    ink = [
        int((np.asarray(Image.open(tmp_path / f"{n}.png")) < 60).all(axis=-1).sum())
        for n in ("without", "with")
    ]
    assert ink[1] > ink[0] + 100


def test_images_that_are_not_square_keep_their_shape(tmp_path):
    cell = Cell("wide", (flat(RED, (100, 400)),), ("",))
    contact_sheet([cell], tmp_path / "sheet.png", titles=("one",))
    assert count(tmp_path / "sheet.png", RED) == 192 * 48


def test_cells_must_fit_the_titles(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], tmp_path / "sheet.png", titles=("a",))
    with pytest.raises(ValueError, match="cell 0 has 2 images and 2 captions for 1 titles"):
        contact_sheet([pair()], tmp_path / "sheet.png", titles=("a",))


def test_a_saved_image_carries_its_texts_and_every_pixel(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    texts = {"prompt": "猫 <b> \n two lines", "seed": "3", "odd": "a\0b"}
    save_image(image, tmp_path / "0000.png", texts)
    with Image.open(tmp_path / "0000.png") as opened:
        opened.load()
        np.testing.assert_array_equal(np.asarray(opened), image)
        assert opened.info["prompt"] == texts["prompt"]
        assert opened.info["seed"] == "3"
        assert opened.info["odd"] == "ab"


def test_curves_are_drawn_for_every_reward(tmp_path):
    ys = {"a $reward": [1.0, 2.0, 1.5], "b": [0.0, -1.0, 3.0]}
    curves([0.0, 0.5, 1.0], ys, tmp_path / "curve.png", x_title="share")
    image = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB")).astype(int)
    blue = (image[..., 2] > image[..., 0] + 100) & (image[..., 2] > image[..., 1] + 50)
    middle = image.shape[1] // 2
    # A line in each half.
    assert blue[:, :middle].sum() > 100
    assert blue[:, middle:].sum() > 100
