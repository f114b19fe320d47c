"""`load_reward`: the numbers and gradients of a reward, by itself."""

from __future__ import annotations

import threading

import pytest
import torch

import alignprop_cli
from alignprop_cli import AssetError, ConfigError, RunError
from tests.factories import randn


def images(count: int = 2, size: int = 32) -> torch.Tensor:
    return randn(1, count, 3, size, size, dtype=torch.float32).sigmoid()


def test_a_shipped_reward_by_its_formula_with_its_gradient() -> None:
    given = images().requires_grad_()
    reward = alignprop_cli.load_reward("brightness")
    found = reward(given)
    weights = torch.tensor([0.299, 0.587, 0.114])  # luma of BT.601
    expected = torch.einsum("bchw,c->b", given.detach(), weights) / 32**2
    torch.testing.assert_close(found.detach(), expected)
    (gradient,) = torch.autograd.grad(found.sum(), given)
    torch.testing.assert_close(gradient, (weights / 32**2)[:, None, None].expand(2, 3, 32, 32))


def test_the_embedded_clip_by_name_takes_one_prompt_or_one_for_each() -> None:
    given = images().requires_grad_()
    reward = alignprop_cli.load_reward("clip", model="tiny")
    one = reward(given, "a red circle")
    each = reward(given, ["a red circle", "a blue square"])
    assert one.shape == (2,)
    assert one[0] == each[0]
    assert one[1] != each[1]
    one.sum().backward()
    assert given.grad is not None
    assert float(given.grad.abs().max()) > 0.0


class Scaled:
    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def __call__(self, images, prompts):
        return self.gain * images.mean(dim=(1, 2, 3))


def test_a_function_a_class_and_an_object_are_rewards(tmp_path) -> None:
    given = images()
    mean = given.mean(dim=(1, 2, 3))
    for reward in (
        alignprop_cli.load_reward(Scaled(2.0)),
        alignprop_cli.load_reward(Scaled, gain=2.0),
        alignprop_cli.load_reward(lambda images, prompts: 2.0 * images.mean(dim=(1, 2, 3))),
    ):
        torch.testing.assert_close(reward(given), 2.0 * mean)
    file = tmp_path / "mine.py"
    file.write_text("def half(images, prompts):\n    return images.mean(dim=(1, 2, 3)) / 2\n")
    torch.testing.assert_close(alignprop_cli.load_reward(f"{file}:half")(given), mean / 2)


def test_what_would_give_numbers_that_mean_nothing_is_refused() -> None:
    reward = alignprop_cli.load_reward("contrast")
    for wrong, said in [
        (images() * 2 - 1, r"in \[0, 1\], got values from -"),
        ((images() * 255).to(torch.uint8), r"in \[0, 1\], got torch.uint8"),
        (images()[0], r"shape \(B, 3, H, W\)"),
        (images()[:0], r"shape \(B, 3, H, W\)"),
    ]:
        with pytest.raises(ConfigError, match=said):
            reward(wrong)
    with pytest.raises(ConfigError, match="3 prompts for 2 images"):
        reward(images(), ["a", "b", "c"])
    with pytest.raises(RunError, match="NaN"):
        reward(torch.full((1, 3, 8, 8), float("nan")))


def test_mistakes_in_what_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="clip: no model is named"):
        alignprop_cli.load_reward("clip")
    with pytest.raises(ConfigError, match="unknown reward 'brigtness'"):
        alignprop_cli.load_reward("brigtness")
    with pytest.raises(ConfigError, match="unknown option 'modle'"):
        alignprop_cli.load_reward("clip", model="tiny", modle="tiny")
    with pytest.raises(ConfigError, match="expected one reward"):
        alignprop_cli.load_reward(["contrast"])  # type: ignore[arg-type]
    with pytest.raises(AssetError, match="no such file"):
        alignprop_cli.load_reward("nowhere.py:mine")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float64"}, "dtype: unknown 'float64'"),
        ({"device": "nonsense"}, "device 'nonsense'"),
        # Of the class's own constructor, which would never be given them.
        ({"weight": 3.0}, "weight is a setting of the training"),
        ({"loss": 3}, "loss is a setting of the training"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(options, words) -> None:
    with pytest.raises(ConfigError, match=words):
        alignprop_cli.load_reward(Weighted, **options)


class Weighted:
    def __init__(self, weight: float = 1.0, loss: float = 0.0) -> None:
        self.weight, self.loss = weight, loss

    def __call__(self, images, prompts):
        return self.weight * images.mean(dim=(1, 2, 3)) - self.loss


def test_it_is_loaded_in_a_thread_and_used_in_another() -> None:
    found: list[alignprop_cli.LoadedReward] = []
    thread = threading.Thread(target=lambda: found.append(alignprop_cli.load_reward(Scaled(3.0))))
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0](images()), 3.0 * images().mean(dim=(1, 2, 3)))
