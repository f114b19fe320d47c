"""The mix of LoRAs is the weighted sum of their weight updates, and diffusers agrees."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from alignprop_cli import adapter, lora, soup
from alignprop_cli.config import ModelConfig
from alignprop_cli.models.registry import load_model
from alignprop_cli.soup import Factors
from tests.factories import fill_lora_b, randn, small_pipeline

# Factors are rounded to float32 once.
TOLERANCE = 1e-6


def random_lora(seed: int, *, rank: int = 3, alpha: float = 3.0, stabilised: bool = False):
    """Return factors of two linear layers and a convolution."""

    def normal(number: int, *shape: int) -> torch.Tensor:
        return randn(100 * seed + number, *shape, dtype=torch.float32)

    factor = soup.scaling(alpha, rank, rank_stabilised=stabilised)
    return {
        "a.to_q": Factors(normal(0, rank, 8), normal(1, 12, rank), factor),
        "b.to_out.0": Factors(normal(2, rank, 5), normal(3, 6, rank), factor),
        "conv": Factors(normal(4, rank, 4, 3, 3), normal(5, 7, rank, 1, 1), factor),
    }


def relative_error(mixed, expected) -> float:
    """Return the L2 distance over all layers, relative to that of what is expected."""
    wrong = sum(float((mixed[n].delta() - expected[n]).square().sum()) for n in expected)
    norm = sum(float(value.square().sum()) for value in expected.values())
    assert norm > 1e-3
    return math.sqrt(wrong / norm)


def weighted_sum(members, coefficients):
    """Return sum_i c_i delta_i of every layer, by its definition."""
    pairs = list(zip(members, coefficients, strict=True))
    return {name: sum(c * m[name].delta() for m, c in pairs) for name in members[0]}


@pytest.mark.parametrize("coefficients", [(0.5, 0.5), (0.7, 0.3), (1.5, -0.5), (2.0, 1.0)])
@pytest.mark.parametrize(
    "other",
    [
        {"rank": 3, "alpha": 3.0},
        {"rank": 3, "alpha": 6.0},
        {"rank": 5, "alpha": 1.0},
        {"rank": 4, "alpha": 4.0, "stabilised": True},
    ],
    ids=["same", "alpha", "rank", "rslora"],
)
def test_a_mix_is_the_weighted_sum_of_the_updates(coefficients, other):
    members = [random_lora(1), random_lora(2, **other)]
    mixed = soup.mix(members, coefficients)
    assert relative_error(mixed, weighted_sum(members, coefficients)) < TOLERANCE
    assert {f.rank for f in mixed.values()} == {3 + other["rank"]}
    assert all(f.scaling == 1.0 for f in mixed.values())


def test_rslora_scales_by_the_root_of_the_rank():
    assert soup.scaling(8.0, 16) == 0.5
    assert soup.scaling(8.0, 16, rank_stabilised=True) == 2.0


@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (1.0,)])
def test_all_of_one_member_is_that_member_at_its_own_rank(coefficients):
    members = [random_lora(1, alpha=1.5), random_lora(2)][: len(coefficients)]
    mixed = soup.mix(members, coefficients)
    assert relative_error(mixed, weighted_sum(members[:1], (1.0,))) < TOLERANCE
    assert {f.rank for f in mixed.values()} == {3}


def test_with_the_base_model_a_mix_is_the_member_at_lower_strength():
    member = random_lora(1, alpha=6.0)
    mixed = soup.mix([member], [0.3])
    assert relative_error(mixed, {n: 0.3 * f.delta() for n, f in member.items()}) < TOLERANCE


def test_the_order_of_members_does_not_matter():
    members = [random_lora(1), random_lora(2, rank=5), random_lora(3, alpha=1.0)]
    coefficients = [0.2, 0.3, 0.5]
    forwards = soup.mix(members, coefficients)
    backwards = soup.mix(members[::-1], coefficients[::-1])
    expected = {name: factors.delta() for name, factors in forwards.items()}
    assert relative_error(backwards, expected) < TOLERANCE


def test_averaging_the_factors_is_another_model():
    members = [random_lora(1), random_lora(2)]
    averaged = {
        name: Factors(
            (members[0][name].down + members[1][name].down) / 2,
            (members[0][name].up + members[1][name].up) / 2,
            1.0,
        )
        for name in members[0]
    }
    assert relative_error(averaged, weighted_sum(members, (0.5, 0.5))) > 0.3


def test_nothing_but_zeros_is_still_a_lora_without_effect():
    mixed = soup.mix([random_lora(1)], [0.0])
    assert all(float(f.delta().abs().max()) == 0.0 for f in mixed.values())


def test_half_precision_is_mixed_in_float32():
    half = {n: Factors(f.down.half(), f.up.half(), f.scaling) for n, f in random_lora(1).items()}
    mixed = soup.mix([half, half], [0.25, 0.5])
    assert relative_error(mixed, weighted_sum([half, half], (0.25, 0.5))) < TOLERANCE
    assert {f.up.dtype for f in mixed.values()} == {torch.float32}


def test_members_that_do_not_belong_together_are_refused():
    first = random_lora(1)
    fewer = {name: f for name, f in random_lora(2).items() if name != "conv"}
    with pytest.raises(ValueError, match=r"LoRA 1: 1 layers .* only the first has conv"):
        soup.mix([first, fewer], [0.5, 0.5])
    wider = {**first, "a.to_q": Factors(torch.ones(3, 9), torch.ones(12, 3), 1.0)}
    with pytest.raises(ValueError, match=r"a\.to_q is \(12, 9\) .* \(12, 8\)"):
        soup.mix([first, wider], [0.5, 0.5])


def test_non_finite_numbers_are_refused():
    broken = random_lora(1)
    broken["conv"].up[0, 0] = float("nan")
    with pytest.raises(ValueError, match="conv holds NaN"):
        soup.mix([broken], [1.0])
    with pytest.raises(ValueError, match="finite"):
        soup.mix([random_lora(1)], [float("inf")])
    with pytest.raises(ValueError, match="1 coefficients for 2"):
        soup.mix([random_lora(1), random_lora(2)], [1.0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[Path]]:
    """Return a small pipeline and two LoRAs of it, of different rank and alpha."""
    root = tmp_path_factory.mktemp("soup")
    base = small_pipeline(root / "base")
    folders = []
    for number, (rank, alpha) in enumerate([(2, 4.0), (3, 3.0)]):
        model = load_model(ModelConfig(id=str(base)), torch.device("cpu"))
        targets = ("to_q", "to_k", "to_v", "to_out.0")
        lora.inject(model.network, rank=rank, alpha=alpha, target_modules=targets, seed=number)
        fill_lora_b(model.network, seed=number)
        folder = root / f"lora{number}"
        folder.mkdir()
        model.save_lora(folder, lora.weights(model.network), {})
        folders.append(folder)
    return base, folders


def test_plain_diffusers_draws_the_same_with_the_mix_as_with_both_members(trained, tmp_path):
    base, folders = trained
    members = [adapter.read(adapter.locate(str(folder)).file).layers for folder in folders]
    adapter.write(tmp_path, soup.mix(members, (0.7, 0.3)), {})

    inputs = (
        randn(7, 2, 4, 8, 8, dtype=torch.float32),
        500,
        randn(8, 2, 5, 32, dtype=torch.float32),
    )

    def output(*names: str) -> torch.Tensor:
        pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
        if names == ("both",):
            for number, folder in enumerate(folders):
                pipeline.load_lora_weights(folder, adapter_name=f"n{number}")
            pipeline.set_adapters(["n0", "n1"], [0.7, 0.3])
        elif names:
            pipeline.load_lora_weights(tmp_path)
        with torch.no_grad():
            return pipeline.unet(*inputs, return_dict=False)[0]

    plain, both, mixed = output(), output("both"), output("mix")
    assert float((both - plain).norm() / plain.norm()) > 1e-3
    torch.testing.assert_close(mixed, both, rtol=1e-4, atol=1e-5)
