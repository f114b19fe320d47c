"""The mix of LoRAs is the weighted sum of their weight updates, and diffusers agrees."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import get_args

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model

from alignprop_cli.errors import RunError
from alignprop_cli.lora import files, formats
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora import mixing as soup
from alignprop_cli.lora.factors import Factors, scaling
from alignprop_cli.lora.recipe import Method
from tests.factories import fill_lora_b, randn, small_pipeline

# Factors are rounded to float32 once.
TOLERANCE = 1e-6


def random_lora(seed: int, *, rank: int = 3, alpha: float = 3.0, stabilised: bool = False):
    """Return factors of two linear layers and a convolution."""

    def normal(number: int, *shape: int) -> torch.Tensor:
        return randn(100 * seed + number, *shape, dtype=torch.float32)

    pairs = {
        "a.to_q": (normal(0, rank, 8), normal(1, 12, rank)),
        "b.to_out.0": (normal(2, rank, 5), normal(3, 6, rank)),
        "conv": (normal(4, rank, 4, 3, 3), normal(5, 7, rank, 1, 1)),
    }
    return {name: Factors(down, up, alpha, stabilised) for name, (down, up) in pairs.items()}


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
    mixed = soup.mix(members, coefficients).layers
    assert relative_error(mixed, weighted_sum(members, coefficients)) < TOLERANCE
    assert {f.rank for f in mixed.values()} == {3 + other["rank"]}
    assert all(f.scaling == 1.0 for f in mixed.values())


def test_rslora_scales_by_the_root_of_the_rank():
    assert scaling(8.0, 16) == 0.5
    assert scaling(8.0, 16, rank_stabilised=True) == 2.0


@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (1.0,)])
def test_all_of_one_member_is_that_member_at_its_own_rank(coefficients):
    members = [random_lora(1, alpha=1.5), random_lora(2)][: len(coefficients)]
    mixed = soup.mix(members, coefficients).layers
    assert relative_error(mixed, weighted_sum(members[:1], (1.0,))) < TOLERANCE
    assert {f.rank for f in mixed.values()} == {3}


def test_with_the_base_model_a_mix_is_the_member_at_lower_strength():
    member = random_lora(1, alpha=6.0)
    mixed = soup.mix([member], [0.3]).layers
    assert relative_error(mixed, {n: 0.3 * f.delta() for n, f in member.items()}) < TOLERANCE


def test_the_order_of_members_does_not_matter():
    members = [random_lora(1), random_lora(2, rank=5), random_lora(3, alpha=1.0)]
    coefficients = [0.2, 0.3, 0.5]
    forwards = soup.mix(members, coefficients).layers
    backwards = soup.mix(members[::-1], coefficients[::-1]).layers
    expected = {name: factors.delta() for name, factors in forwards.items()}
    assert relative_error(backwards, expected) < TOLERANCE


def test_averaging_the_factors_is_another_model():
    members = [random_lora(1), random_lora(2)]
    averaged = {
        name: Factors(
            (members[0][name].down + members[1][name].down) / 2,
            (members[0][name].up + members[1][name].up) / 2,
            3.0,
        )
        for name in members[0]
    }
    assert relative_error(averaged, weighted_sum(members, (0.5, 0.5))) > 0.3


def one_layer(down, up):
    return {"layer": Factors(torch.tensor(down), torch.tensor(up), 1.0)}


def test_a_member_changes_nothing_in_a_layer_that_it_lacks():
    first, fewer = random_lora(1), random_lora(2)
    del fewer["conv"]
    assert soup.missing(first, fewer) == "1 layers are not in both; only the first has conv"
    mixed = soup.mix([fewer, first], [0.25, 0.5]).layers
    conv = first["conv"]
    expected = {n: 0.25 * f.delta() + 0.5 * first[n].delta() for n, f in fewer.items()}
    assert relative_error(mixed, expected | {"conv": 0.5 * conv.delta()}) < TOLERANCE
    assert mixed["conv"].rank == conv.rank


def test_exact_is_the_cat_of_peft():
    """An independent implementation; only for one scaling, where it is right."""
    network = torch.nn.Sequential(OrderedDict(layer=torch.nn.Linear(7, 5, bias=False)))
    settings = {"lora_alpha": 8, "target_modules": ["layer"], "init_lora_weights": False}
    model = get_peft_model(network, LoraConfig(r=2, **settings), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=4, **settings))
    model.base_model.add_weighted_adapter(["first", "second"], [0.7, -0.4], "both", "cat")
    layer = model.base_model.model.layer
    members = [
        {"layer": Factors(layer.lora_A[n].weight.data, layer.lora_B[n].weight.data, 8.0)}
        for n in ("first", "second")
    ]
    mixed = soup.mix(members, [0.7, -0.4]).layers
    assert relative_error(mixed, {"layer": layer.get_delta_weight("both").double()}) < TOLERANCE


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 99])
def test_svd_is_the_nearest_lora_of_its_rank(rank):
    members, coefficients = [random_lora(1), random_lora(2, rank=5)], (0.7, 0.3)
    whole = weighted_sum(members, coefficients)
    mixed = soup.mix(members, coefficients, "svd", rank=rank)
    lost = total = 0.0
    for name, delta in whole.items():
        values = torch.linalg.svdvals(delta.flatten(1))
        lost += float(values[rank:].square().sum())  # Eckart, Young
        total += float(values.square().sum())
        assert mixed.layers[name].rank == min(rank, 8, *delta.flatten(1).shape)
    # Factors are rounded to float32 before.
    assert mixed.error == pytest.approx(math.sqrt(lost / total), abs=1e-7)
    wrong = sum(float((mixed.layers[n].delta() - d).square().sum()) for n, d in whole.items())
    assert math.sqrt(wrong / total) == pytest.approx(mixed.error, abs=1e-6)
    assert mixed.error > 0.05 or rank >= 5


def test_without_a_rank_svd_takes_the_largest_of_the_members():
    mixed = soup.mix([random_lora(1, rank=2), random_lora(2, rank=4)], (0.5, 0.5), "svd")
    assert {f.rank for f in mixed.layers.values()} == {4}


def test_factor_interpolates_each_factor_by_itself():
    members = [random_lora(1, alpha=6.0), random_lora(2, alpha=6.0)]
    mixed = soup.mix(members, (0.7, 0.3), "factor").layers
    for name, made in mixed.items():
        a, b = (member[name] for member in members)
        up = 0.7 * a.up.double() + 0.3 * b.up.double()
        down = 0.7 * a.down.double() + 0.3 * b.down.double()
        expected = 2.0 * (up.flatten(1) @ down.flatten(1))
        torch.testing.assert_close(made.delta().flatten(1), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"a\.to_q: factors .* got 3 and 1, 5 and 0\.6"):
        soup.mix([random_lora(1), random_lora(2, rank=5)], (0.7, 0.3), "factor")


def test_ties_trims_elects_a_sign_and_averages_who_is_left():
    # Updates [4, 1, -3, 2] and [-5, 6, -1, 0.5]; half of each stays: [4, 0, -3, 0], [-5, 6, 0, 0].
    first = one_layer([[4.0, 1.0, -3.0, 2.0]], [[1.0]])
    second = one_layer([[-5.0, 6.0, -1.0, 0.5]], [[1.0]])
    # 4 against -5: minus wins, with -5. Times the coefficients 2 and 10.
    expected = torch.tensor([[-50.0, 60.0, -6.0, 0.0]], dtype=torch.float64)
    mixed = soup.mix([first, second], (2.0, 10.0), "ties", density=0.5)
    torch.testing.assert_close(mixed.layers["layer"].delta(), expected, rtol=1e-6, atol=1e-5)
    assert mixed.error == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("density", [0.3, 0.75, 1.0])
def test_ties_is_its_algorithm_value_by_value(density):
    """Algorithm 1 of arXiv:2306.01708 written out; no update of these holds a zero or a tie."""
    members, shares = [random_lora(1), random_lora(2, rank=5), random_lora(3)], (0.7, 0.3, -0.2)
    mixed = soup.mix(members, shares, "ties", density=density, rank=99).layers
    for name, factors in mixed.items():
        deltas = [member[name].delta().flatten().tolist() for member in members]
        kept = int(density * len(deltas[0]))
        least = [sorted(map(abs, delta), reverse=True)[kept - 1] for delta in deltas]
        expected = []
        for values in zip(*deltas, strict=True):
            trimmed = [v if abs(v) >= low else 0.0 for v, low in zip(values, least, strict=True)]
            heavier = sum(trimmed)
            left = [c * v for c, v in zip(shares, trimmed, strict=True) if v * heavier > 0.0]
            expected.append(sum(left) / max(1, len(left)))
        found = factors.delta().flatten()
        torch.testing.assert_close(
            found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5
        )


def test_dare_keeps_a_random_share_and_makes_up_for_the_rest():
    members, coefficients = [random_lora(1), random_lora(2)], (0.7, 0.3)
    everything = soup.mix(members, coefficients, "dare_linear", rank=12, density=1.0).layers
    whole = weighted_sum(members, coefficients)
    assert relative_error(everything, whole) < TOLERANCE

    def drawn(seed):
        made = soup.mix(members, coefficients, "dare_linear", rank=12, density=0.5, seed=seed)
        return {name: factors.delta() for name, factors in made.layers.items()}

    single = soup.mix(members[:1], [1.0], "dare_linear", rank=12, density=0.5).layers["a.to_q"]
    ratio = single.delta() / members[0]["a.to_q"].delta()
    # Each value is left out or doubled.
    left_out = ratio.abs() < 1e-3
    torch.testing.assert_close(
        ratio[~left_out], torch.full_like(ratio[~left_out], 2.0), rtol=0.01, atol=0.01
    )
    assert 0.3 < float(left_out.double().mean()) < 0.7
    again, other = drawn(0), drawn(1)
    assert all(torch.equal(again[name], value) for name, value in drawn(0).items())
    assert any(not torch.allclose(again[name], value) for name, value in other.items())


def test_nothing_but_zeros_is_still_a_lora_without_effect():
    mixed = soup.mix([random_lora(1)], [0.0]).layers
    assert all(float(f.delta().abs().max()) == 0.0 for f in mixed.values())


def test_half_precision_is_mixed_in_float32():
    half = {n: Factors(f.down.half(), f.up.half(), f.alpha) for n, f in random_lora(1).items()}
    mixed = soup.mix([half, half], [0.25, 0.5]).layers
    assert relative_error(mixed, weighted_sum([half, half], (0.25, 0.5))) < TOLERANCE
    assert {f.up.dtype for f in mixed.values()} == {torch.float32}


def test_members_that_do_not_belong_together_are_refused():
    first = random_lora(1)
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


@pytest.mark.parametrize("method", get_args(Method))
def test_a_mix_that_float32_cannot_hold_is_refused(method):
    with pytest.raises(
        RunError, match=r"the mix of layer a\.to_q holds numbers that are too large"
    ):
        soup.mix([random_lora(1), random_lora(2)], [1e308, -1e308], method)


def test_dare_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    soup.mix([random_lora(1)], [1.0], "dare_linear", seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[Path]]:
    """Return a small pipeline and two LoRAs of it, of different rank and alpha."""
    root = tmp_path_factory.mktemp("soup")
    base = small_pipeline(root / "base")
    folders = []
    for number, (rank, alpha) in enumerate([(2, 4.0), (3, 3.0)]):
        network = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
        targets = ("to_q", "to_k", "to_v", "to_out.0")
        lora.inject(network, rank=rank, alpha=alpha, target_modules=targets, seed=number)
        fill_lora_b(network, seed=number)
        folder = root / f"lora{number}"
        folder.mkdir()
        settings = lora.adapter_metadata(network)
        files.save(folder, lora.weights(network), {}, prefix="unet.", adapter_metadata=settings)
        folders.append(folder)
    return base, folders


def test_plain_diffusers_draws_the_same_with_the_mix_as_with_both_members(trained, tmp_path):
    base, folders = trained
    members = [files.read(files.locate(str(folder)).file).layers for folder in folders]
    weights, settings = formats.packed(soup.mix(members, (0.7, 0.3)).layers)
    files.save(tmp_path, weights, {}, prefix="unet.", adapter_metadata=settings)

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
