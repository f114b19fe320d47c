"""Rewards on the meta device: the work and the weights of the real ones, without loading them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.rewards import registry
from alignprop_cli.rewards.frozen import MetaReward
from alignprop_cli.rewards.qwen_vl import Words
from tests.rewards.small import NETWORKS, PROMPTS, SMALL, noise, shrink_hps


def on_meta(name: str, options: dict[str, Any]) -> MetaReward:
    found = registry.on_meta(name, options, torch.float32)
    assert found is not None
    return found


def flops(run: Any) -> int:
    # The counter has no formula for the fused kernel of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("variant", [v for v in NETWORKS if v != "imagereward"])
def test_it_has_the_weights_and_the_work_of_the_reward_itself(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_hps(monkeypatch)
    name, options = variant.split()[0], SMALL[variant](tmp_path)
    reward: Any = registry.build(name, options)
    if name in ("vlm", "hpsv3"):
        # The planner reckons with a text of some length; here with the one there is.
        texts = [Words.of(reward._processor, reward._asked(prompt)) for prompt in PROMPTS]
        longest = max(len(text.before) + len(text.after) for text in texts)
        monkeypatch.setattr(sys.modules[type(reward).__module__], "_PLANNED", longest - 1)
    meta = on_meta(name, options)
    weights = sum(p.numel() for network in reward.networks for p in network.parameters())
    assert meta.parameters == registry.parameters(name, options) == weights
    images = noise(40, 56).requires_grad_()
    reward(images, PROMPTS)  # texts are cached before anything is counted
    shapes = images.detach().to("meta").requires_grad_()
    # What is made of the features, such as the products with texts, is next to nothing.
    assert flops(lambda: meta(shapes)) == pytest.approx(
        flops(lambda: reward(images, PROMPTS)), rel=0.02
    )


@pytest.mark.parametrize("name", [*registry.SHIPPED, "count owlv2"])
def test_shipped_rewards_are_known_without_downloads(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name, *kind = name.split()
    options: dict[str, Any] = {"object": "cat"} if name in ("count", "remove") else {}
    if kind:
        options["model"] = "google/owlv2-base-patch16-ensemble"
    if not registry.SHIPPED[name].trainable:
        assert registry.on_meta(name, options, torch.float32) is None
        return
    meta = on_meta(name, options)
    images = torch.zeros((2, 3, 64, 48), device="meta", requires_grad=True)
    rewards = meta(images)
    assert (rewards.shape, rewards.device.type) == ((2,), "meta")
    assert torch.autograd.grad(rewards.sum(), [images])[0].shape == images.shape
    assert all(tensor.device.type == "meta" for tensor in meta.tensors)


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("aesthetic", {}, 304e6),  # the vision tower of CLIP ViT-L/14
        ("hps", {}, 986e6),
        ("pickscore", {}, 986e6),
        ("imagereward", {}, 441e6),
        ("siglip", {}, 878e6),
        ("vlm", {}, 2.21e9),
        ("vlm", {"model": "Qwen/Qwen2.5-VL-7B-Instruct"}, 8.29e9),
        ("hpsv3", {}, 7.75e9),
        ("siglip", {"model": "ViT-B-16-SigLIP2"}, 375e6),
        ("clip", {"model": "ViT-B-32"}, 151e6),
        ("count", {"object": "cat"}, 6.5e6),  # YOLOS-tiny
        ("count", {"object": "cat", "model": "google/owlv2-base-patch16-ensemble"}, 155e6),
        ("brightness", {}, 0.0),
    ],
)
def test_the_published_networks_have_their_known_sizes(
    name: str, options: dict[str, Any], parameters: float
) -> None:
    assert registry.parameters(name, options) == pytest.approx(parameters, rel=0.02)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip", {"model": "hf-hub:nobody/nothing"}),
        ("aesthetic", {"model": "nobody/nothing"}),
        ("pickscore", {"model": "nobody/nothing"}),
        ("siglip", {"model": "hf-hub:nobody/nothing"}),
        ("vlm", {"model": "nobody/nothing"}),
        ("count", {"object": "cat", "model": "nobody/yolos"}),
        # kornia looks at values.
        ("compressibility", {"measure": "round_trip"}),
    ],
)
def test_what_is_not_known_before_loading_is_none(name: str, options: dict[str, Any]) -> None:
    assert registry.on_meta(name, options, torch.float32) is None
    assert registry.parameters(name, options) == 0


def test_the_networks_have_the_precision_that_is_asked_for() -> None:
    half = registry.on_meta("clip", {}, torch.bfloat16)
    assert half is not None
    assert {t.dtype for t in half.tensors if t.is_floating_point()} == {torch.bfloat16}
    images = torch.zeros((1, 3, 32, 32), device="meta")
    assert half(images).dtype == torch.float32


def test_a_damaged_configuration_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(AssetError, match=r"reward\.clip\.model: cannot load"):
        registry.on_meta("clip", {"model": str(tmp_path)}, torch.float32)


OWN = """
import torch
from alignprop_cli.rewards.frozen import MetaReward

class Mine:
    def __init__(self, width=4):
        self.layer = torch.nn.Linear(3, width)

    @staticmethod
    def on_meta(dtype, width=4):
        with torch.device("meta"):
            layer = torch.nn.Linear(3, width)
        return MetaReward(lambda images: layer(images.mean(dim=(2, 3))), layer, dtype=dtype)

    def __call__(self, images, prompts):
        return self.layer(images.mean(dim=(2, 3))).sum(dim=1)

class Silent(Mine):
    on_meta = None

class Wrong(Mine):
    @staticmethod
    def on_meta(dtype):
        return 3

class Falls(Mine):
    @staticmethod
    def on_meta(dtype):
        return 1 / 0
"""


def test_a_users_own_reward_may_bring_on_meta(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN, encoding="utf-8")
    assert registry.parameters(f"{file}:Mine", {"width": 5}) == 20
    images = torch.zeros((2, 3, 8, 8), device="meta")
    assert on_meta(f"{file}:Mine", {})(images).shape == (2,)
    assert registry.on_meta(f"{file}:Silent", {}, torch.float32) is None
    with pytest.raises(ConfigError, match="on_meta must return a MetaReward or None, got int"):
        registry.on_meta(f"{file}:Wrong", {}, torch.float32)
    with pytest.raises(AssetError, match="on_meta failed: ZeroDivisionError"):
        registry.on_meta(f"{file}:Falls", {}, torch.float32)


def test_a_users_file_is_run_once_until_it_changes(tmp_path: Path) -> None:
    file, log = tmp_path / "own.py", tmp_path / "log"
    source = f"with open({str(log)!r}, 'a') as file:\n    file.write('x')\n{OWN}"
    file.write_text(source, encoding="utf-8")
    registry.parameters(f"{file}:Mine", {})
    registry.build(f"{file}:Mine", {})
    assert log.read_text() == "x"
    file.write_text(source.replace("width=4", "width=6"), encoding="utf-8")
    assert registry.parameters(f"{file}:Mine", {}) == 24
    assert log.read_text() == "xx"
