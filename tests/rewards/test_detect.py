"""Counting and removing objects, with small detectors of random weights in transformers' format."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPTokenizer,
    Owlv2ImageProcessor,
    Owlv2Processor,
    YolosImageProcessor,
)

from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.rewards.detect import Count, Remove, log_probability, number_in
from alignprop_cli.rewards.detector import Detector, owlv2_inputs, yolos_inputs
from tests.factories import randn
from tests.rewards.small import noise, small_owlv2, small_yolos

PROMPTS = ["two cats", "3 cats", "one cat"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "yolos": small_yolos(tmp_path_factory.mktemp("yolos")),
        "owlv2": small_owlv2(tmp_path_factory.mktemp("owlv2")),
    }


@pytest.fixture(params=["yolos", "owlv2"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> str:
    return str(folders[request.param])


# --- The distribution of the number ---


def test_the_log_probability_is_the_sum_over_all_subsets() -> None:
    log_odds = 2.0 * randn(0, 2, 6)
    p = torch.sigmoid(log_odds)
    for number in range(7):
        expected = torch.zeros(2, dtype=torch.float64)
        for subset in itertools.combinations(range(6), number):
            chosen = torch.zeros(6, dtype=torch.bool)
            chosen[list(subset)] = True
            expected += torch.where(chosen, p, 1.0 - p).prod(dim=1)
        numbers = torch.full((2,), number)
        torch.testing.assert_close(log_probability(log_odds, numbers), expected.log())


def test_rows_may_ask_for_different_numbers() -> None:
    log_odds = randn(1, 2, 5)
    both = log_probability(log_odds, torch.tensor([0, 4]))
    torch.testing.assert_close(both[:1], log_probability(log_odds[:1], torch.tensor([0])))
    torch.testing.assert_close(both[1:], log_probability(log_odds[1:], torch.tensor([4])))


@pytest.mark.parametrize("number", [0, 1, 3])
def test_its_gradient_sums_to_the_missing_objects(number: int) -> None:
    # d log P(K = N) / dz_q = P(q | K = N) - p_q, and P(q | K = N) sums to N.
    log_odds = (2.0 * randn(2, 1, 8)).requires_grad_()
    (gradient,) = torch.autograd.grad(
        log_probability(log_odds, torch.tensor([number])).sum(), [log_odds]
    )
    missing = number - torch.sigmoid(log_odds).sum()
    torch.testing.assert_close(gradient.sum(), missing)


def test_with_nothing_found_the_best_places_rise_by_their_odds() -> None:
    # All p tiny, N = 1: log P = log sum_q odds_q, whose gradient is the softmax of log-odds.
    log_odds = (randn(3, 1, 6) - 30.0).requires_grad_()
    (gradient,) = torch.autograd.grad(
        log_probability(log_odds, torch.tensor([1])).sum(), [log_odds]
    )
    torch.testing.assert_close(gradient, log_odds.softmax(dim=1), atol=1e-9, rtol=1e-6)


def test_gradcheck_of_the_log_probability() -> None:
    log_odds = (3.0 * randn(4, 2, 5)).requires_grad_()
    numbers = torch.tensor([0, 3])
    assert torch.autograd.gradcheck(lambda z: log_probability(z, numbers), [log_odds])


def test_it_is_finite_and_best_at_sure_answers() -> None:
    sure = torch.tensor([[80.0, 80.0, -80.0, -80.0]], requires_grad=True)
    values = torch.cat([log_probability(sure, torch.tensor([n])) for n in range(5)])
    # One too few or too many: two ways of e^-80.
    once = math.log(2.0) - 80.0
    torch.testing.assert_close(values, torch.tensor([-160.0, once, 0.0, once, -160.0]))
    (gradient,) = torch.autograd.grad(values.sum(), [sure])
    assert torch.isfinite(gradient).all()


def test_ascent_on_log_odds_ends_at_the_number() -> None:
    log_odds = (randn(5, 1, 10) - 6.0).requires_grad_()
    for _ in range(60):
        value = log_probability(log_odds, torch.tensor([3])).sum()
        (gradient,) = torch.autograd.grad(value, [log_odds])
        log_odds = (log_odds.detach() + 2.0 * gradient).requires_grad_()
    p = torch.sigmoid(log_odds.detach())
    assert int((p > 0.9).sum()) == 3
    assert int((p < 0.1).sum()) == 7


# --- The rewards ---


def test_removing_is_counting_to_none(folder: str) -> None:
    images = noise(32, 40)
    remove, count = Remove("dog", folder), Count("dog", 0, folder)
    torch.testing.assert_close(remove(images, PROMPTS), count(images, PROMPTS))
    assert (remove(images, PROMPTS) < 0.0).all()


def test_yolos_scores_are_those_of_the_librarys_post_processing(folders: dict[str, Path]) -> None:
    images = noise(32, 40)
    scores = torch.stack(
        [
            torch.sigmoid(Detector("count", name, str(folders["yolos"])).log_odds(images)[0])
            for name in ("cat", "dog", "traffic light")
        ]
    )  # (classes, B, Q)
    detector = Detector("count", "cat", str(folders["yolos"]))
    inputs = yolos_inputs(images, detector.network.config)
    output = detector.network(pixel_values=inputs)
    library = YolosImageProcessor().post_process_object_detection(output, threshold=0.0)
    seen = 0
    for index, result in enumerate(library):
        for query, (score, label) in enumerate(
            zip(result["scores"], result["labels"], strict=True)
        ):
            if int(label) > 0:  # 0 is N/A, which cannot be asked for
                seen += 1
                torch.testing.assert_close(scores[int(label) - 1, index, query], score)
    assert seen >= 3


def test_owlv2_scores_are_those_of_the_librarys_post_processing(folders: dict[str, Path]) -> None:
    images = noise(24, 32)
    detector = Detector("count", "cat", str(folders["owlv2"]))
    log_odds, boxes = detector.log_odds(images)
    size = {"height": 32, "width": 32}
    processor: Any = Owlv2Processor(
        image_processor=Owlv2ImageProcessor(size=size, do_rescale=False),
        tokenizer=CLIPTokenizer.from_pretrained(folders["owlv2"], model_max_length=24),
    )
    inputs = processor(text=[["a photo of a cat"]] * 3, images=list(images), return_tensors="pt")
    output = detector.network(**inputs)
    torch.testing.assert_close(boxes, output.pred_boxes)
    library = processor.image_processor.post_process_object_detection(output, threshold=0.0)
    for mine, result in zip(log_odds, library, strict=True):
        torch.testing.assert_close(torch.sigmoid(mine), result["scores"])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 64), (64, 40), (512, 512), (17, 23)])
def test_yolos_is_fed_as_the_library_does(
    folders: dict[str, Path], height: int, width: int
) -> None:
    images = noise(height, width)
    detector = Detector("count", "cat", str(folders["yolos"]))
    processor = YolosImageProcessor(
        size={"shortest_edge": 32, "longest_edge": 48}, do_rescale=False, do_pad=False
    )
    library = processor(images=list(images), return_tensors="pt").pixel_values
    fitted = yolos_inputs(images, detector.network.config)
    torch.testing.assert_close(fitted, library, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 20), (40, 64), (90, 100)])
def test_owlv2_is_fed_as_the_library_does(
    folders: dict[str, Path], height: int, width: int
) -> None:
    images = noise(height, width)
    detector = Detector("count", "cat", str(folders["owlv2"]))
    processor = Owlv2ImageProcessor(size={"height": 32, "width": 32}, do_rescale=False)
    library = processor(images=list(images), return_tensors="pt").pixel_values
    squared = owlv2_inputs(images, detector.network.config)
    torch.testing.assert_close(squared, library, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "processor"), [("yolos", YolosImageProcessor), ("owlv2", Owlv2ImageProcessor)]
)
def test_an_answer_at_the_librarys_threshold_counts_half(
    folders: dict[str, Path], kind: str, processor: Any
) -> None:
    report = inspect.signature(processor.post_process_object_detection)
    threshold = Detector("count", "cat", str(folders[kind]))._threshold
    assert torch.sigmoid(torch.tensor(threshold)) == pytest.approx(
        report.parameters["threshold"].default
    )


def test_there_is_a_gradient_where_nothing_is_detected(folder: str) -> None:
    reward = Count("cat", 2, folder)
    network = reward.detector.network
    if network.config.model_type == "yolos":
        network.class_labels_classifier.layers[-1].bias.data[-1] += 30.0  # "no object"
    else:
        network.class_head.logit_scale.weight.data.zero_()
        network.class_head.logit_shift.bias.data -= 30.0
    images = noise(32, 32).requires_grad_()
    assert float(reward.expected(images).detach().max()) < 1e-9
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), [images])
    assert (gradient.flatten(1).norm(dim=1) > 1e-2).all()


@pytest.mark.parametrize("number", [0, 3])
def test_ascent_on_pixels_moves_the_count_towards_the_number(folder: str, number: int) -> None:
    reward, images = Count("cat", number, folder), noise(32, 32)
    moved = images.clone()
    for _ in range(20):
        moved.requires_grad_()
        (gradient,) = torch.autograd.grad(reward(moved, PROMPTS).sum(), [moved])
        length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        moved = (moved.detach() + 0.1 * gradient / length).clamp(0.0, 1.0)
    assert (reward(moved, PROMPTS) > reward(images, PROMPTS)).all()
    distance = (reward.expected(images) - number).abs()
    assert ((reward.expected(moved) - number).abs() < distance).all()


class Boxes(Detector):
    """A detector that answers with given boxes and log-odds."""

    def __init__(self, log_odds: Tensor, boxes: Tensor) -> None:
        self.answer, self._threshold, self._reward = (log_odds, boxes), 0.0, "count"

    def log_odds(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.answer


def test_overlapping_answers_are_one_place() -> None:
    # Two boxes in the left half that share 0.9 of it, one at the right.
    boxes = torch.tensor([[[0.25, 0.5, 0.5, 1.0], [0.25, 0.5, 0.45, 1.0], [0.75, 0.5, 0.5, 1.0]]])
    log_odds = torch.tensor([[1.0, 2.0, -1.0]], requires_grad=True)
    places = Boxes(log_odds, boxes).places(torch.zeros(1))
    torch.testing.assert_close(places, torch.tensor([[4.0, -2.0]]))  # squared odds
    (gradient,) = torch.autograd.grad(places.sum(), [log_odds])
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 2.0, 2.0]]))
    # Three are asked for, and only two are apart: the next best fills up.
    places = Boxes(log_odds, boxes).places(torch.zeros(1), [3])
    torch.testing.assert_close(places, torch.tensor([[4.0, -2.0, 2.0]]))
    with pytest.raises(ConfigError, match="at most 3 objects apart, got 4"):
        Boxes(log_odds, boxes).places(torch.zeros(1), [4])


# --- Words ---


@pytest.mark.parametrize(
    ("prompt", "object_", "number"),
    [
        ("two cats on a sofa", "cat", 2),
        ("A photo of Twelve red balloons", "balloon", 12),
        ("3 cats and four dogs", "dog", 4),
        ("3 cats and four dogs", "cat", 3),
        ("five boxes", "box", 5),
        ("seven mice", "mouse", 7),
        ("a 3d render of one traffic light", "traffic light", 1),
    ],
)
def test_the_number_of_the_prompt(prompt: str, object_: str, number: int) -> None:
    assert number_in(prompt, object_) == number


@pytest.mark.parametrize("prompt", ["a cat", "cats, two of them", "two dogs and three mice", ""])
def test_a_prompt_without_the_number_is_refused(prompt: str) -> None:
    object_ = "cat" if "cat" in prompt else "mouse"
    with pytest.raises(ConfigError, match="names no number") as caught:
        number_in(prompt, object_)
    assert "set reward.count.number" in str(caught.value.hint)


@pytest.mark.parametrize(
    "prompt",
    [
        *("twenty-one cats", "thirty two cats", "one hundred cats", "a hundred and one cats"),
        *("two dozen cats", "1,000 cats", "2.5 cats", "in 2020, 3 dozen small cats"),
        "two hundred of them",
    ],
)
def test_a_part_of_a_number_is_not_taken_for_it(prompt: str) -> None:
    with pytest.raises(ConfigError, match="names no number of 'cat'"):
        number_in(prompt, "cat")
    # What is beside such a number is read as before.
    assert number_in(f"{prompt}, and 2 dogs", "dog") == 2
    assert number_in("a hundred houses, in 2020 two cats", "cat") == 2


def test_the_number_of_each_prompt_is_the_one_counted_to(folder: str) -> None:
    images = noise(32, 32)
    read = Count("cat", model=folder)(images, ["one cat", "three cats", "zero cats"])
    for index, number in enumerate((1, 3, 0)):
        fixed = Count("cat", number, folder)(images, PROMPTS)
        torch.testing.assert_close(read[index], fixed[index], rtol=1e-5, atol=1e-5)


def test_a_folder_below_home_is_found_by_the_libraries_too(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folders["yolos"].parent))
    name = f"~/{folders['yolos'].name}"
    images = noise(32, 32)
    expected = Remove("cat", str(folders["yolos"]))(images, PROMPTS)
    assert torch.equal(Remove("cat", name)(images, PROMPTS), expected)
    assert Remove.on_meta(torch.float32, model=name) is not None
    (folders["yolos"].parent / "empty").mkdir()
    with pytest.raises(AssetError, match=r"^reward\.remove\.model: "):
        Remove.on_meta(torch.float32, model="~/empty")


def test_an_unknown_word_is_refused_with_the_nearest(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"reward\.count\.object.*Did you mean 'cat'") as caught:
        Count("cats", 1, str(folders["yolos"]))
    assert "owlv2" in str(caught.value.hint)
    with pytest.raises(ConfigError, match=r"reward\.remove\.object: .* knows no 'N/A'"):
        Remove("N/A", str(folders["yolos"]))
    Remove("Traffic Light", str(folders["yolos"]))
    Remove("a word of any kind", str(folders["owlv2"]))


def test_the_words_of_an_open_detector_matter(folders: dict[str, Path]) -> None:
    images = noise(32, 32)
    cat, dog = (Remove(name, str(folders["owlv2"]))(images, PROMPTS) for name in ("cat", "dog"))
    assert not torch.allclose(cat, dog, rtol=1e-3)


def test_a_number_out_of_range_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"reward\.count\.number: expected 0 to 100, got -1"):
        Count("cat", -1, str(folders["yolos"]))
    with pytest.raises(ConfigError, match="at most 7 objects apart, got 8"):
        Count("cat", 8, str(folders["yolos"]))(noise(32, 32), PROMPTS)


# --- Files ---


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="is a 'vit'"):
        Count("cat", 1, str(tmp_path))


def test_missing_and_damaged_files_are_reported(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(AssetError, match=r"reward\.count\.model: cannot load"):
        Count("cat", 1, str(tmp_path / "nothing"))
    with pytest.raises(AssetError, match=r"reward\.remove\.model: cannot load"):
        Remove("cat", str(tmp_path))
    source = folders["yolos"]
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(AssetError, match="cannot load"):
        Count("cat", 1, str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(AssetError, match="cannot load"):
        Count("cat", 1, str(tmp_path))
    state = load_file(source / "model.safetensors")
    del state["bbox_predictor.layers.0.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssetError, match=r"lacks bbox_predictor\.layers\.0\.weight"):
        Count("cat", 1, str(tmp_path))


def test_a_hub_id_without_the_network_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError, match="cannot load nobody/nothing") as caught:
        Count("cat", 1, "nobody/nothing")
    assert "reward.count.model" in str(caught.value.hint)
