"""The reward contract, held by every shipped reward, and how rewards are named and mixed."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignprop_cli.config.schema import LossConfig, RewardConfig
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import AssetError, ConfigError, RunError
from alignprop_cli.prompts import load_prompts
from alignprop_cli.rewards import pixel, registry
from alignprop_cli.rewards.base import depends_on
from alignprop_cli.rewards.clip import ClipReward
from alignprop_cli.rewards.mixture import Member, Mixture, build_mixture
from tests.factories import generator, small_clip

PIXEL = ("brightness", "redness", "contrast", "colourfulness", "symmetry")
PROMPTS = ["a cat", "two dogs", "a boat"]
CPU = torch.device("cpu")
NONE = type(None)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> ClipReward:
    return ClipReward(str(clip_folder))


def noise(height: int = 20, width: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand((3, 3, height, width), generator=generator(0), dtype=dtype)


def test_the_clip_reward_has_the_gradient_of_central_differences(clip_folder: Path) -> None:
    reward = ClipReward(str(clip_folder))
    images = noise(12, 12).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), [images])
    direction = gradient / gradient.norm()
    width = 0.02
    with torch.no_grad():
        ahead, behind = (reward(images + s * width * direction, PROMPTS).sum() for s in (1.0, -1.0))
    # float32 rewards of 1e-7 precision over a difference of about 1e-2, and a curved function.
    assert float((ahead - behind) / (2.0 * width)) == pytest.approx(
        float(gradient.norm()), rel=1e-2
    )


def test_the_clip_reward_is_the_cosine_with_the_own_prompt(clip: ClipReward) -> None:
    images = noise()
    rewards = clip(images, PROMPTS)
    features, texts = clip.image_features(images), clip.text_features(PROMPTS)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(rewards, (features @ texts.T).diagonal())
    assert not torch.allclose(rewards, clip(images, PROMPTS[::-1]))


def test_pixel_rewards_have_their_values_on_plain_pictures() -> None:
    def plain(red: float, green: float, blue: float) -> Tensor:
        return (
            torch.tensor([red, green, blue], dtype=torch.float32)
            .view(1, 3, 1, 1)
            .expand(1, 3, 6, 6)
        )

    assert float(pixel.brightness(plain(1, 1, 1), [""])) == pytest.approx(1.0)
    assert float(pixel.brightness(plain(0, 1, 0), [""])) == pytest.approx(0.587)
    assert float(pixel.redness(plain(1, 0, 0), [""])) == pytest.approx(1.0)
    assert float(pixel.redness(plain(0.5, 0.5, 0.5), [""])) == pytest.approx(0.0)
    halves = torch.cat([torch.zeros(1, 3, 4, 2), torch.ones(1, 3, 4, 2)], dim=-1)
    assert float(pixel.contrast(halves, [""])) == pytest.approx(0.5, abs=1e-5)
    assert float(pixel.symmetry(halves, [""])) == pytest.approx(-1.0)
    assert float(pixel.symmetry(plain(0.2, 0.4, 0.6), [""])) == 0.0
    assert float(pixel.colourfulness(plain(0.3, 0.3, 0.3), [""])) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("name", PIXEL)
def test_a_flat_image_has_a_finite_gradient(name: str) -> None:
    images = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    registry.build(name, {})(images, [""]).sum().backward()
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()


# --- Names ---


def test_options_read_from_the_source_are_those_of_the_constructor() -> None:
    for name, shipped in registry.SHIPPED.items():
        target = registry._import(name)
        options = inspect.signature(target).parameters if inspect.isclass(target) else {}
        assert list(shipped.options) == list(options)
        # Their types too, as Python itself reads the annotations; YAML gives lists for sequences.
        hints = typing.get_type_hints(target.__init__) if options else {}
        for option, kind in shipped.options.items():
            union = isinstance(hints[option], types.UnionType)
            allowed = typing.get_args(hints[option]) if union else (hints[option],)
            assert [kind] == [list if a == Sequence[str] else a for a in allowed if a is not NONE]


def test_every_text_that_may_name_a_file_or_a_hub_id_is_a_place_with_its_default() -> None:
    # All other texts: what a detector looks for, what a model is asked, and one of a few words.
    words = {"object", "version", "measure", "question"}
    for name, shipped in registry.SHIPPED.items():
        target = registry._import(name)
        parameters = inspect.signature(target).parameters
        assert all(value == parameters[option].default for option, value in shipped.places.items())
        texts = {option for option, kind in shipped.options.items() if kind is str}
        assert shipped.places.keys() == texts - words, name
        assert ":" not in name


def test_names_and_options_are_checked_without_torch() -> None:
    code = (
        "import sys\n"
        "from alignprop_cli.rewards import registry\n"
        "for name in registry.SHIPPED: registry.check(name, {})\n"
        "registry.check('count', {'object': 'cat', 'number': 3})\n"
        "print(*({'torch', 'transformers', 'open_clip'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_unknown_names_and_options_are_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'brightness'"):
        registry.build("brightnes", {})
    with pytest.raises(ConfigError, match="Did you mean 'model'"):
        registry.check("clip", {"modle": "tiny"})
    with pytest.raises(ConfigError, match="Did you mean 'standardise'"):
        registry.check("clip", {"standardize": True})
    # As typed for training; no module is looked for.
    with pytest.raises(ConfigError, match=r"'clip:0\.5': expected the name of a .* got '0\.5'"):
        registry.check("clip:0.5", {})
    # What derives from `clip` names its own option.
    for name in ("clip", "clip_count", "clip_choice"):
        with pytest.raises(ConfigError, match=rf"^reward\.{name}\.pretrained: the model ViT-B-32"):
            registry.build(name, {"model": "ViT-B-32"})


def test_a_reward_of_the_users_own_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def red(images, prompts):\n    return images[:, 0].mean(dim=(1, 2))\n\n\n"
        "class Scaled:\n    def __init__(self, factor=1.0):\n        self.factor = factor\n\n"
        "    def __call__(self, images, prompts):\n"
        "        return self.factor * images.mean(dim=(1, 2, 3))\n\n\nNUMBER = 3\n"
    )
    images = noise()
    red = registry.build(f"{file}:red", {})
    torch.testing.assert_close(red(images, PROMPTS), images[:, 0].mean(dim=(1, 2)))
    scaled = registry.build(f"{file}:Scaled", {"factor": 2.0})
    torch.testing.assert_close(scaled(images, PROMPTS), 2.0 * images.mean(dim=(1, 2, 3)))
    with pytest.raises(ConfigError, match="Did you mean 'red'"):
        registry.build(f"{file}:reed", {})
    with pytest.raises(ConfigError, match="is not a function or a class"):
        registry.build(f"{file}:NUMBER", {})
    with pytest.raises(ConfigError, match="takes no options"):
        registry.build(f"{file}:red", {"factor": 2.0})
    with pytest.raises(ConfigError, match="faktor"):
        registry.build(f"{file}:Scaled", {"faktor": 2.0})
    with pytest.raises(AssetError, match="no such file"):
        registry.build(f"{tmp_path}/other.py:red", {})
    (tmp_path / "falls.py").write_text("KEY = {}['key']\n")
    with pytest.raises(AssetError, match=r"cannot import .*falls\.py: KeyError: 'key'"):
        registry.build(f"{tmp_path}/falls.py:red", {})
    with pytest.raises(AssetError, match="cannot import"):
        registry.build("no_such_package_anywhere:red", {})


def test_a_clip_model_that_is_not_there_is_reported(tmp_path: Path, clip_folder: Path) -> None:
    with pytest.raises(AssetError, match="no such folder"):
        ClipReward(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="Did you mean 'ViT-B-32"):
        ClipReward("ViT-B-33")
    with pytest.raises(ConfigError, match="openai"):
        ClipReward("ViT-B-32")
    (tmp_path / "open_clip_config.json").write_bytes(
        (clip_folder / "open_clip_config.json").read_bytes()
    )
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"cut")
    with pytest.raises(AssetError, match="cannot load"):
        ClipReward(str(tmp_path))


# --- Mixtures ---


def test_a_mixture_sums_weighted_losses_and_keeps_each_reward_apart() -> None:
    mixture = build_mixture(
        {
            "brightness": RewardConfig(weight=2.0, loss=None),
            "redness": RewardConfig(
                weight=-0.5, loss=LossConfig(kind="target", target=0.25, scale=4.0)
            ),
        },
        LossConfig(kind="maximise", target=None, scale=3.0),
        CPU,
    )
    images = noise()
    scores = mixture.score(images, PROMPTS)
    assert list(scores) == ["brightness", "redness"]
    bright, red = pixel.brightness(images, PROMPTS), pixel.redness(images, PROMPTS)
    assert torch.equal(scores["brightness"], bright)
    assert torch.equal(scores["redness"], red)
    expected = 2.0 * (-3.0 * bright) - 0.5 * (4.0 * (red - 0.25).abs())
    torch.testing.assert_close(mixture.losses(scores), expected)


def test_members_have_kinds_and_targets_of_their_own_in_value_and_gradient() -> None:
    """Through the configuration, as a file has it: one of each kind, two of them with targets."""
    config = parse(
        {
            "reward": {
                "brightness": {"weight": 2.0, "loss": {"kind": "hinge", "target": 0.505}},
                "redness": {"loss": {"kind": "target", "target": 0.001, "scale": 3.0}},
                "contrast": {"weight": 0.5, "loss": {"kind": "maximise"}},
                "colourfulness": {},
            },
            "loss": {"kind": "hinge", "target": 1.0, "scale": 0.1},
        }
    )
    mixture = build_mixture(config.reward, config.loss, CPU)
    # The first image is brighter than its target, and the last is darker.
    images = (noise() * torch.linspace(1.1, 0.9, len(PROMPTS))[:, None, None, None]).clamp(0.0, 1.0)
    gradient, losses, scores = mixture.differentiate(images, PROMPTS, lambda each: each.sum())
    assert (scores["brightness"] > 0.505).any()
    assert (scores["brightness"] < 0.505).any()

    leaf = images.clone().requires_grad_()
    expected = (
        2.0 * (0.505 - pixel.brightness(leaf, PROMPTS)).clamp(min=0.0)
        + 3.0 * (pixel.redness(leaf, PROMPTS) - 0.001).abs()
        - 0.5 * pixel.contrast(leaf, PROMPTS)
        + 0.1 * (1.0 - pixel.colourfulness(leaf, PROMPTS)).clamp(min=0.0)
    )
    torch.testing.assert_close(losses, expected.detach())
    (by_hand,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(gradient, by_hand)


def test_a_standardised_member_is_measured_in_the_base_models_deviations() -> None:
    target = LossConfig(kind="hinge", target=0.6)
    mixture = build_mixture(
        {
            "brightness": RewardConfig(weight=2.0, standardise=True, base_mean=0.4, base_std=0.1),
            "contrast": RewardConfig(standardise=True, loss=target),
            "redness": RewardConfig(base_mean=0.1, base_std=0.2),
        },
        LossConfig(),
        CPU,
    )
    mixture.standardise("contrast", 0.2, 0.05)
    images = noise()
    scores = mixture.score(images, PROMPTS)
    expected = -2.0 * (scores["brightness"] - 0.4) / 0.1
    expected = expected + (0.6 - scores["contrast"]).clamp(min=0.0) / 0.05
    expected = expected - scores["redness"]  # not asked to be
    torch.testing.assert_close(mixture.losses(scores), expected)
    with pytest.raises(RunError, match=r"reward\.redness\.standardise: .* all have the reward 0.5"):
        mixture.standardise("redness", 0.5, 0.0)


def test_extra_metrics_are_measured_and_never_trained_on() -> None:
    class Reward:
        extra_metrics = {"area": lambda images: images.sum(dim=(1, 2, 3))}  # noqa: RUF012

        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            return images.mean(dim=(1, 2, 3))

    mixture = Mixture([Member("mine", Reward(), 1.0, LossConfig())])
    assert (mixture.names, mixture.metrics) == (("mine",), ("mine", "area"))
    images = noise().requires_grad_()
    scores = mixture.score(images, PROMPTS)
    torch.testing.assert_close(scores["area"], images.detach().sum(dim=(1, 2, 3)))
    assert not scores["area"].requires_grad
    torch.testing.assert_close(mixture.losses(scores), -scores["mine"])


class Extra:
    """A reward with extra metrics, and something that is called as features are."""

    image_features = 3

    def __init__(self, extra_metrics: object) -> None:
        self.extra_metrics = extra_metrics

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize(
    ("extra_metrics", "match"),
    [
        (
            {"brightness": torch.sum},
            "'mine': its extra metric 'brightness' has the same name",
        ),
        (
            ["sharp"],
            r"reward 'mine': extra_metrics must map names to functions of images, got \['sharp'\]",
        ),
        ({"sharp": 1.0}, r"reward 'mine': extra_metrics must map names .* got {'sharp': 1.0}"),
    ],
)
def test_an_extra_metric_never_replaces_another_metric(extra_metrics: object, match: str) -> None:
    brightness = Member("brightness", registry.build("brightness", {}), 1.0, LossConfig())
    mine = Member("mine", Extra(extra_metrics), 1.0, LossConfig())
    with pytest.raises(ConfigError, match=match):
        Mixture([brightness, mine])


def test_features_are_those_of_shipped_rewards_alone(clip: ClipReward) -> None:
    mine = Member("mine", Extra({}), 1.0, LossConfig())
    assert Mixture([mine]).features is None
    images = noise()
    found = Mixture([mine, Member("clip", clip, 1.0, LossConfig())]).features
    assert found is not None
    torch.testing.assert_close(found(images), clip.image_features(images))


def test_a_precision_without_a_network_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward\.brightness\.dtype: it holds no network"):
        build_mixture({"brightness": RewardConfig(dtype="bfloat16")}, LossConfig(), CPU)


@pytest.mark.parametrize(
    ("name", "nulls", "others"),
    [
        ("clip_count", ("most", "model"), {}),
        ("clip_choice", ("alike", "log"), {"prompts": "animals"}),
        ("compressibility", ("measure", "quality"), {}),
    ],
)
def test_null_is_the_default_of_an_option(
    name: str, nulls: tuple[str, ...], others: dict[str, str]
) -> None:
    options = {**others, **dict.fromkeys(nulls)}
    reward, usual = registry.build(name, options), registry.build(name, others)
    images, prompts = torch.rand((1, 3, 48, 48), generator=generator(0)), ["two small red circles"]
    assert torch.equal(reward(images, prompts), usual(images, prompts))
    assert registry.on_meta(name, options, torch.float32) is not None


@pytest.mark.parametrize("value", [True, 3.0, "three"])
def test_an_option_of_another_type_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"reward\.count\.number: expected a int"):
        registry.check("count", {"object": "cat", "number": value})


@pytest.mark.parametrize(
    ("answer", "error", "match"),
    [
        (lambda images: images.mean(), ConfigError, "shape"),
        (lambda images: 1.0, ConfigError, "float"),
        (lambda images: images.mean(dim=(1, 2, 3)) / 0.0, RunError, "image 0.*'a cat'"),
    ],
)
def test_a_wrong_answer_of_a_reward_is_refused(
    answer: object, error: type[Exception], match: str
) -> None:
    reward = lambda images, prompts: answer(images)  # type: ignore[operator]  # noqa: E731
    loss = LossConfig(kind="maximise", target=None, scale=1.0)
    mixture = Mixture([Member("mine", reward, 1.0, loss)])
    with pytest.raises(error, match=match):
        mixture.score(noise(), PROMPTS)


def test_a_reward_that_changes_its_images_is_refused() -> None:
    mixture = Mixture([Member("mine", lambda images, prompts: images.sub_(0.5), 1.0, LossConfig())])
    with pytest.raises(ConfigError, match="reward 'mine' changes the images it is given"):
        mixture.score(noise(), PROMPTS)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda images: images.mean(dim=(1, 2, 3)), True),
        (
            lambda images: checkpoint(torch.sum, images, use_reentrant=True),
            True,
        ),
        (lambda images: images.detach().mean(), False),
        # A head that someone forgot to freeze, on features that were taken without a gradient.
        (lambda images: torch.nn.Linear(16, 1)(images.detach()), False),
        (lambda images: images, True),
    ],
)
def test_what_depends_on_the_images_is_told_from_what_only_has_a_gradient(
    answer: Callable[[Tensor], Tensor], expected: bool
) -> None:
    images = noise().requires_grad_() * 2.0
    assert depends_on(answer(images), images) == expected


def test_the_features_of_a_text_do_not_depend_on_what_was_asked_before() -> None:
    texts = load_prompts("shapes-heldout")[:12]
    together, apart, again = (ClipReward("tiny") for _ in range(3))
    expected = together.text_features(texts)
    single = [apart.text_features([text]) for text in reversed(texts)]
    assert torch.equal(torch.cat(single[::-1]), expected)
    again.text_features(texts[5:7])
    assert torch.equal(again.text_features(texts), expected)


def test_a_fault_is_told_as_the_users_only_in_the_blamed_block() -> None:
    def fails(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    shipped = Member("brightness", registry.build("brightness", {}), 1.0, LossConfig())
    with pytest.raises(RuntimeError, match="kernel"), Mixture([shipped]).blamed():
        raise RuntimeError("kernel")
    mixture = Mixture([shipped, Member("mine.py:fails", fails, 1.0, LossConfig())])
    told = r"the gradient of 'mine\.py:fails' failed: RuntimeError"
    with pytest.raises(RunError, match=told), mixture.blamed():
        raise RuntimeError("kernel")
    # Memory that runs out is nobody's fault: the plan is changed.
    with pytest.raises(torch.OutOfMemoryError), mixture.blamed():
        raise torch.OutOfMemoryError
