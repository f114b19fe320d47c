"""Keyed randomness: a draw is a function of its key and of nothing else."""

from __future__ import annotations

import hashlib
import itertools
from typing import get_args

import pytest
import torch

from alignprop_cli import rng


def test_the_key_is_a_hash_of_its_arguments() -> None:
    digest = hashlib.blake2b(b"3/noise/5/7", digest_size=8).digest()
    assert rng.key(3, "noise", 5, 7) == int.from_bytes(digest, "big") // 2


def test_keys_differ_in_every_argument_and_fit_a_signed_integer() -> None:
    arguments = itertools.product((0, 1, 11), get_args(rng.Purpose), ((), (1,), (1, 1), (11,)))
    keys = [rng.key(seed, purpose, *counters) for seed, purpose, counters in arguments]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys)


def test_an_image_has_the_same_noise_in_every_batch() -> None:
    images = [(step, number) for step in range(2) for number in range(3)]
    together = rng.image_noise(0, "noise", images, (4, 2, 2))
    assert together.shape == (6, 4, 2, 2)
    assert together.dtype == torch.float32
    for image, expected in zip(images, together, strict=True):
        assert torch.equal(rng.image_noise(0, "noise", [image], (4, 2, 2))[0], expected)
    assert len({tuple(noise.flatten().tolist()) for noise in together}) == 6


def test_common_counters_are_further_keys() -> None:
    first = rng.image_noise(0, "eta", [(1,), (2,)], (3,), 5)
    assert torch.equal(first, rng.image_noise(0, "eta", [(1, 5), (2, 5)], (3,)))
    assert not torch.equal(first, rng.image_noise(0, "eta", [(1,), (2,)], (3,), 6))


def test_nothing_else_is_touched_and_nothing_else_matters() -> None:
    state = torch.get_rng_state()
    first = rng.image_noise(0, "noise", [(0,)], (5,))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert torch.equal(rng.image_noise(0, "noise", [(0,)], (5,)), first)


def test_the_noise_is_standard_normal() -> None:
    noise = rng.image_noise(0, "noise", [(i,) for i in range(200)], (200,)).double()
    # 40000 draws: mean to 0.005, second moment to 0.007; 5 standard deviations.
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.025)
    assert float(noise.square().mean()) == pytest.approx(1.0, abs=0.036)
