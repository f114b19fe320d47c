"""From a configuration to a plan: the estimator, what is counted, and what is said of it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from alignprop_cli.calls import LastCalls
from alignprop_cli.config import presets
from alignprop_cli.config.schema import Config
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import ConfigError, RunError
from alignprop_cli.estimators import (
    Estimator,
    draft_lv,
    drtune,
    full,
    gaussian_k,
    last_k,
    leap,
    random_k,
    refl,
    sparse,
)
from alignprop_cli.lora.factors import Factors
from alignprop_cli.lora.files import Adapter
from alignprop_cli.models.meta import meta_model
from alignprop_cli.planning import request as planning
from alignprop_cli.planning.estimate import GIB, NOTHING, Budget, Estimate
from alignprop_cli.planning.plan import Plan
from alignprop_cli.planning.window import describe, with_window
from alignprop_cli.planning.work import Work
from alignprop_cli.rewards import registry
from alignprop_cli.schedule import NoiseSchedule, Step


def config(**gradient: Any) -> Config:
    return parse({"reward": {"brightness": {}}, "gradient": gradient})


@pytest.mark.parametrize(
    ("gradient", "estimator"),
    [
        ({"method": "full"}, full()),
        ({"method": "last_k", "k": 7}, last_k(7)),
        ({"method": "random_k", "k_min": 2}, random_k(2)),
        ({"method": "random_k", "k_min": 2, "k_max": 9}, random_k(2, 9)),
        ({"method": "gaussian_k", "mean": 0.7, "std": 0.2}, gaussian_k(0.7, 0.2)),
        ({"method": "draft_lv"}, draft_lv(2)),
        ({"method": "draft_lv", "copies": 4, "own_end": False}, draft_lv(4, own_end=False)),
        ({"method": "refl"}, refl((0.75, 1.0))),
        ({"method": "refl", "span": [0.2, 0.9]}, refl((0.2, 0.9))),
        ({"method": "drtune"}, drtune(3, (0.6, 1.0))),
        ({"method": "drtune", "calls": 2, "span": [0.5, 1.0]}, drtune(2, (0.5, 1.0))),
        ({"method": "leap"}, leap(0.3, 0.1)),
        ({"method": "leap", "alpha": 0.1, "tau": None}, leap(0.1, None)),
        ({"method": "sparse"}, sparse(3, 2.0, 0.0)),
        (
            {"method": "sparse", "calls": 4, "late_bias": 1.0, "rescale": 0.5, "span": [0.4, 1.0]},
            sparse(4, 1.0, 0.5, (0.4, 1.0)),
        ),
        ({"method": "refl", "endpoint": "chain"}, replace(refl(), endpoint="chain")),
        ({"method": "full", "endpoint": "predicted"}, replace(full(), endpoint="predicted")),
    ],
)
def test_every_method_has_its_estimator(gradient: dict[str, Any], estimator: Estimator) -> None:
    chosen = config(**gradient)
    assert planning.make_estimator(chosen.gradient) == estimator
    assert planning.plan_request(chosen, 1).estimator == estimator


def test_an_estimator_from_outside_takes_the_place_of_the_configurations() -> None:
    own = Estimator(LastCalls(3, 3), input_grad=0.5)
    assert planning.plan_request(config(), 2, own).estimator == own


def test_a_request_holds_what_the_configuration_says() -> None:
    chosen = parse(
        {
            "reward": {"brightness": {}},
            "sample": {"num_inference_steps": 20},
            "gradient": {
                "method": "full",
                "rollout_steps": 4,
                "checkpoint_network": "block",
                "checkpoint_decoder": True,
            },
            "train": {"batch_size": 24, "micro_batch": 5, "rollout_batch": 8, "decode_batch": 2},
        }
    )
    request = planning.plan_request(chosen, 3)
    assert (request.batch_size, request.processes, request.share) == (24, 3, 8)
    assert (request.rollout_batch, request.micro_batch, request.decode_batch) == (8, 5, 2)
    assert (request.checkpoint_network, request.checkpoint_decoder) == ("block", True)
    assert (request.checkpoint_reward, request.is_open) == ("auto", True)
    assert (request.num_inference_steps, request.rollout_steps, request.longest) == (20, 4, 20)


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_can_be_planned_for(name: str) -> None:
    request = planning.plan_request(presets.resolve(preset=name), 1)
    assert request.estimator.problems(request.num_inference_steps) == []


def counted(
    rewards: Mapping[str, Any], image_size: tuple[int, int], device_type: str
) -> tuple[Mapping[bool, Work], int, tuple[str, ...]]:
    """Return what rewards need, the bytes of their weights, and the names of uncounted ones."""
    latents = (4, image_size[0] // 8, image_size[1] // 8)
    chosen = Config.model_validate({"reward": rewards})
    found = planning._with_rewards(NOTHING, chosen, image_size, latents, device_type)
    return found.reward, found.weights["reward weights"], found.uncounted


def test_a_reward_that_is_not_known_before_it_is_loaded_is_said_not_to_be_counted(
    tmp_path: Any,
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("def best(images, prompts):\n    return images.mean((1, 2, 3))\n")
    members: dict[str, Any] = {f"{mine}:best": {}, "brightness": {}}
    works, weights, uncounted = counted(members, (16, 16), "cpu")
    assert uncounted == (f"{mine}:best",)
    assert weights == 0
    # Luma keeps nothing of the image's size but is made of it.
    assert isinstance(works[False], Work)
    assert works[False].forward(1) > 0.0


WITHOUT_NETWORK = (
    *("brightness", "redness", "contrast", "colourfulness", "symmetry"),
    *("compressibility", "incompressibility"),
)


@pytest.mark.parametrize("name", WITHOUT_NETWORK)
def test_every_reward_without_a_network_can_be_counted(name: str) -> None:
    works, weights, uncounted = counted({name: {}}, (32, 16), "cuda")
    assert (weights, uncounted) == (0, ())
    assert works[False].forward(1) > 0.0
    assert works[True].forward(2) == 2 * works[False].forward(1)


def test_the_weights_of_a_reward_are_counted_in_its_precision() -> None:
    members: dict[str, Any] = {"clip": {"dtype": "bfloat16"}, "brightness": {}}
    works, weights, uncounted = counted(members, (32, 32), "cpu")
    assert uncounted == ()
    assert weights == 2 * registry.parameters("clip", {}) > 0
    # Its blocks are recomputed in the second one.
    assert works[True].saved(1) < works[False].saved(1)
    assert works[True].backward_flops > works[False].backward_flops


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GB", 12 * GIB),
        ("800 MiB", 800 * 2**20),
        ("800MB", 800 * 10**6),
        ("6.5gib", 6.5 * GIB),
        (" 6.5 GiB ", 6.5 * GIB),
        ("1000", 1000),
        ("1000B", 1000),
    ],
)
def test_memory_is_read_as_people_write_it(text: str, size: float) -> None:
    assert planning.parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0", "3TBs", "1.2.3GB", "12 GB or so"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory: expected something like 12GB"):
        planning.parse_memory(text)


def test_the_memory_of_this_machine_is_found() -> None:
    from alignprop_cli.training import plans

    budget = plans.budget_here(Accelerator(cpu=True), config())
    assert budget.device_type == "cpu"
    assert 0.1 * GIB < budget.bytes < 10_000 * GIB
    assert budget.usable < budget.bytes


def test_a_dry_run_for_a_card_keeps_to_the_limit_of_the_configuration() -> None:
    from alignprop_cli.training import plans

    def budget(limit: str | None) -> Budget:
        values = config().model_dump() | {"train": {"memory_limit": limit}}
        return plans.budget_here(Accelerator(cpu=True), parse(values), "12GB")

    # As a run on such a card: without a limit, with one, and with one that is more than there is.
    assert budget(None) == Budget(12 * GIB, "cuda", "--gpu-memory")
    assert budget("8GB") == Budget(8 * GIB, "cuda", "train.memory_limit")
    assert budget("16GB") == Budget(12 * GIB, "cuda", "--gpu-memory")


@pytest.mark.parametrize(
    ("assignments", "told"),
    [
        (
            ("gradient.method=sparse", "gradient.calls=3"),
            r"gradient\.span: 0\.75 to 1\.0 are 1 .* sparse draws 3",
        ),
        (("gradient.method=random_k", "gradient.k_min=2"), r"2 is more than gradient\.k_max \(1\)"),
    ],
)
def test_a_share_of_the_path_with_too_few_calls_is_refused(
    assignments: tuple[str, ...], told: str
) -> None:
    """As the presets with gradient.path_share, and another method."""
    share = ("gradient.k_max=null", "gradient.path_share=0.1")
    chosen = presets.resolve(preset="tiny_flow", assignments=[*share, *assignments])
    with pytest.raises(ConfigError, match=r"0\.1 of the path are the last 1 of 4 calls") as error:
        with_window(chosen)
    (problem,) = error.value.problems
    assert re.search(told, f"{problem.key}: {problem.message}")


@pytest.mark.parametrize(
    ("estimator", "advice"),
    [
        (last_k(1), "set gradient.path_share"),
        (draft_lv(2), "take another gradient.method"),
        (gaussian_k(0.9, 0.0), "take another gradient.method"),
    ],
)
def test_a_window_of_next_to_nothing_is_told_with_what_would_help(
    estimator: Estimator, advice: str
) -> None:
    # Ten steps, of which the last covers a hundredth of the path.
    levels = itertools.pairwise([*np.linspace(1.0, 0.01, 10).tolist(), 0.0])
    steps = tuple(Step(1000 * s, 1.0 - s, s, 1.0 - after, after) for s, after in levels)
    said, warning = describe(NoiseSchedule(steps, "flow"), estimator)
    assert str(said).endswith("cover 1.0% of the path from noise to image")
    assert warning == (
        f"{said}, so they can change next to nothing: {advice}, or sample.spacing: linear"
    )


def test_late_calls_are_drawn_with_the_largest_bias_of_the_longest_chain() -> None:
    with pytest.raises(ConfigError) as error:
        config(method="sparse", late_bias=65.0)
    assert [problem.key for problem in error.value.problems] == ["gradient.late_bias"]
    late = planning.make_estimator(config(method="sparse", late_bias=64.0).gradient)
    (path,) = late.draw(1000, torch.Generator().manual_seed(0))
    # Half of all first draws are of the last 11: (1 - 11 / 1000)^65 is 0.49.
    assert len(path) == 3
    assert min(path.calls) > 800


def test_a_limit_is_kept_where_nothing_is_left_to_choose() -> None:
    from alignprop_cli.training import plans

    chosen = presets.resolve(preset="tiny", rewards={"brightness": None})
    request, budget = planning.plan_request(chosen, 1), Budget(2**28, "cpu", "train.memory_limit")
    assert not request.is_open
    assert plans.plan_here(chosen, request, budget)[0].estimate is None
    train = chosen.train.model_copy(update={"memory_limit": "256MiB"})
    with pytest.raises(RunError, match=r"no plan fits 0\.25 GiB \(train\.memory_limit\)"):
        plans.plan_here(chosen.model_copy(update={"train": train}), request, budget)


def test_a_lora_that_is_trained_further_is_planned_with_its_own_layers_and_ranks() -> None:
    chosen = config()
    network = meta_model(chosen.model, torch.float32).parts.network.module
    layers = {
        name: Factors(
            torch.zeros(rank, module.in_features), torch.zeros(module.out_features, rank), 1.0
        )
        for (name, module), rank in zip(linear(network), (9, 5), strict=False)
    }
    adapter = Adapter(Path("a.safetensors"), layers, {}, "")
    found = planning.measure(chosen, "cpu", adapter)
    assert found.trained == sum(f.down.numel() + f.up.numel() for f in layers.values())
    assert len(layers) == 2


def linear(network: torch.nn.Module) -> list[tuple[str, torch.nn.Linear]]:
    return [(n, m) for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)]


def test_a_plan_is_said_with_where_its_memory_goes() -> None:
    expected = Estimate({"network weights": 2 * GIB, "latents": 7, "decoder": 3 * GIB}, 4e12, 2e12)
    plan = Plan(
        batch_size=4,
        processes=1,
        rollout_batch=4,
        micro_batch=2,
        decode_batch=1,
        estimate=expected,
    )
    said = planning.describe(plan, Budget(12 * GIB, "cuda", "--gpu-memory"))
    assert said[0] == f"plan: {plan.describe()}"
    assert said[1] == (
        "memory: 5.00 of 12.00 GiB (--gpu-memory): decoder 3.00, network weights 2.00"
    )
    assert said[2].startswith("work: 4 TFLOP a step and process, 2.00 x what it takes with nothing")


@pytest.mark.parametrize(
    ("model", "has_one"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", True),
        ("black-forest-labs/FLUX.2-klein-4B", False),
    ],
)
def test_only_models_that_have_a_small_decoder_are_advised_to_take_it(
    model: str, has_one: bool
) -> None:
    values = {"model": {"id": model, "vae_tile_size": 256}, "reward": {"brightness": {}}}
    said = planning.plan_request(parse(values), processes=1).advice
    assert ("decoder" in said) == has_one
