"""Rewards that measure latents: called with them, differentiated in them, nothing decoded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import alignprop_cli
from alignprop_cli.config.schema import LossConfig, RewardConfig
from alignprop_cli.errors import ConfigError, RunError
from alignprop_cli.evaluation.draw import Sample, draw_samples
from alignprop_cli.images import to_uint8
from alignprop_cli.lora import layers as lora
from alignprop_cli.models.families import open_model
from alignprop_cli.models.meta import meta_model
from alignprop_cli.planning import request as planning
from alignprop_cli.planning import sampling
from alignprop_cli.planning.choose import make_plan
from alignprop_cli.planning.estimate import NOTHING_RECOMPUTED, peak_parts
from alignprop_cli.rewards import registry
from alignprop_cli.rewards.mixture import Member, Mixture
from alignprop_cli.rewards.pixel import brightness
from alignprop_cli.scoring.run import build_measures
from alignprop_cli.training import setup
from alignprop_cli.training.record import Totals
from alignprop_cli.training.trainer import Trainer
from tests.factories import fill_lora_b
from tests.training.test_trainer import small_config

CPU = torch.device("cpu")
PROMPT = "one small red circle on a black background"

DOCUMENTED = Path(__file__).parents[2] / "docs" / "rewards.md"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write the reward that docs/rewards.md shows, and one of images."""
    text = DOCUMENTED.read_text(encoding="utf-8")
    shown = text.split("```python\n# near.py\n")[1].split("```")[0]
    path = tmp_path_factory.mktemp("latents") / "own.py"
    plain = "def plain(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n"
    path.write_text(f"{shown}\n\n{plain}", encoding="utf-8")
    return str(path)


class Near:
    """Minus the mean square distance of latents to a level; keeps what it was called with."""

    takes_latents = True

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.extra_metrics = {"channels": lambda latents: latents[:, :, 0, 0].sum(dim=1)}

    def __call__(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        self.seen.append(latents.detach().clone())
        return -((latents - 0.5) ** 2).mean(dim=(1, 2, 3))


def mixture(*, images: bool = False) -> Mixture:
    members = [Member("near", Near(), 2.0, LossConfig())]
    return Mixture(members + [Member("brightness", brightness, 3.0, LossConfig())] * images)


@pytest.fixture(scope="module")
def shared() -> Trainer:
    """Return a trainer of one prompt, whose rewards and decoder the tests replace."""
    config = small_config(
        gradient={"method": "last_k", "k": 1, "window_group": 4},
        sample={"eta": 0.0},
        train={"max_grad_norm": None, "batch_size": 4, "micro_batch": 2},
    )
    accelerator = Accelerator(cpu=True)
    model = open_model(config.model, [PROMPT, ""], accelerator.device)
    module, targets = model.network.module, model.family.target_modules
    lora.inject(module, rank=4, alpha=4, target_modules=targets, seed=0)
    fill_lora_b(module, seed=1, scale=0.05)
    request = planning.plan_request(config, 1)
    settings = setup.settings(config, model, request.estimator)
    return Trainer(settings, make_plan(request), model, mixture(), [PROMPT], accelerator)


@pytest.fixture
def trainer(shared: Trainer, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setattr(shared.optimizer.rule, "step", lambda: None)
    monkeypatch.setattr(shared, "step_number", 0)
    monkeypatch.setattr(shared, "mixture", mixture())
    shared.optimizer.zero_grad()
    return shared


@pytest.mark.parametrize("images", [False, True], ids=["alone", "mixed"])
def test_the_gradient_in_latents_is_that_computed_by_hand(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, images: bool
) -> None:
    trainer.mixture = mixture(images=images)
    batch = trainer.images()[:2]
    latents = torch.randn(2, *trainer.shape, generator=torch.Generator().manual_seed(0))
    decoder, calls = trainer.model.decoder, []
    decode = decoder.decode
    monkeypatch.setattr(decoder, "decode", lambda *a, **o: calls.append(1) or decode(*a, **o))
    found = trainer.score(batch, latents, Totals(trainer.mixture.metrics))
    assert len(calls) == images
    # The loss is -2 r / 4: d r / d latents = -2 (latents - 0.5) / (C h w).
    expected = (2.0 / 4.0) * 2.0 * (latents - 0.5) / latents[0].numel()
    if images:
        leaf = latents.detach().requires_grad_()
        (-3.0 / 4.0 * brightness(decode(leaf), [""] * 2)).sum().backward()
        assert leaf.grad is not None
        assert float(leaf.grad.norm()) > 1e-6
        expected = expected + leaf.grad
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_it_reaches_the_lora_without_any_decoding(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward, images = Near(), trainer.images()
    # In one graph, from the latents where the path begins.
    with lora.prepared(trainer.model.network.module) as merged:
        starts = trainer.roll_out(images, merged)
        ends = trainer.run_path(images, torch.stack([starts[i.number] for i in images]), merged)
        (-2.0 * reward(ends, []).mean()).backward()

    def gradient() -> Tensor:
        found = [p.grad for p in trainer.optimizer.parameters.values()]
        return torch.cat([g.flatten() for g in found if g is not None]).clone()

    by_hand = gradient()
    trainer.optimizer.zero_grad()
    monkeypatch.setattr(trainer.model.decoder, "decode", None)
    record = trainer.step()
    assert set(record.rewards) == {"near", "channels"}
    assert float(by_hand.norm()) > 1e-4
    # float32, in two micro-batches
    assert float((gradient() - by_hand).norm() / by_hand.norm()) < 1e-5


def test_an_evaluation_measures_the_latents_of_its_images(trainer: Trainer) -> None:
    trainer.mixture = mixture(images=True)
    near = trainer.mixture.members[0].reward
    drawn = draw_samples(
        trainer.model,
        [Sample(PROMPT, 0), Sample(PROMPT, 0, 1)],
        trainer.mixture,
        trainer.settings.sampler,
        seed=0,
        batch_size=2,
    )
    (seen,) = near.seen  # type: ignore[attr-defined]
    with torch.no_grad():
        assert torch.equal(
            to_uint8(trainer.model.decoder.decode(seen)), torch.from_numpy(drawn.images)
        )
    expected = -((seen - 0.5) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(torch.from_numpy(drawn.rewards["near"]).float(), expected)
    assert set(drawn.rewards) == {"near", "brightness", "channels"}


def test_the_plan_has_no_decoder_where_all_rewards_take_latents(file: str) -> None:
    near = f"{file}:Near"
    base = small_config().model_copy(update={"reward": {near: RewardConfig()}})
    both = base.model_copy(update={"reward": {near: RewardConfig(), "brightness": RewardConfig()}})
    alone, mixed = planning.measure(base, "cpu"), planning.measure(both, "cpu")
    assert alone.decoder[False].flops == alone.decoder[False].backward(8) == 0.0
    assert mixed.decoder[False].flops > 0.0
    # Samples are decoded all the same.
    assert alone.weights["decoder weights"] == mixed.weights["decoder weights"] > 0
    assert alone.sampling_decoder == mixed.sampling_decoder
    # The reward itself is counted on latents, of which the square stores one, in float32.
    network = meta_model(base.model, torch.float32).parts.network
    size = 4 * math.prod(network.latent_shape(None, None))
    assert alone.uncounted == ()
    assert alone.reward[False].saved(1) == size
    chain = planning.plan_request(base, 1)
    parts = peak_parts(alone, chain, NOTHING_RECOMPUTED, 8)
    assert parts.get("decoder", 0) == 0
    need = sampling.measure(base, CPU)
    assert need.parts[f"reward {near}"](1) <= 4 * size


def test_image_files_have_no_latents(file: str) -> None:
    with pytest.raises(ConfigError, match=r"Near' measures latents, and an image .* has none"):
        build_measures({f"{file}:Near": RewardConfig()}, LossConfig(), CPU)
    assert not registry.takes_latents(f"{file}:plain")
    assert not registry.takes_latents("brightness")
    with pytest.raises(ConfigError, match="unknown reward 'brightnes'"):
        registry.takes_latents("brightnes")
    with pytest.raises(ConfigError, match="'near' measures latents, and an image"):
        mixture(images=True).score(torch.rand(1, 3, 8, 8), [""])


def test_python_measures_latents_directly(file: str) -> None:
    reward = alignprop_cli.load_reward(f"{file}:Near", level=1.0)
    latents = (2.0 * torch.randn(2, 16, 4, 5)).requires_grad_()
    rewards = reward(latents)
    torch.testing.assert_close(rewards, -((latents - 1.0) ** 2).mean(dim=(1, 2, 3)))
    assert rewards.requires_grad
    assert reward.takes_latents


def test_mistakes_are_told_as_those_of_latents() -> None:
    def changes(latents: Tensor, prompts: Sequence[str]) -> Tensor:
        latents.mul_(2.0)
        return latents.mean(dim=(1, 2, 3))

    def constant(latents: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(latents), requires_grad=True)

    latents = torch.randn(2, 4, 3, 3)
    for function, match in (
        (changes, "'own' changes the latents it is given"),
        (constant, "does not depend on the latents"),
    ):
        function.takes_latents = True  # type: ignore[attr-defined]
        own = Mixture([Member("own", function, 1.0, LossConfig())])
        with pytest.raises(ConfigError, match=match):
            own.differentiate(None, ["", ""], lambda each: each.sum(), latents.requires_grad_())
    broken = latents.detach().clone()
    broken[1, 0, 0, 0] = torch.nan
    with pytest.raises(RunError, match=r"'near': image 1 .* NaN or infinity in its latents"):
        mixture().score(None, ["", ""], broken)
    with pytest.raises(ConfigError, match=r"latents of shape \(B, C, h, w\), got \(4, 3, 3\)"):
        mixture().score(None, ["", ""], latents[0])
