"""What is measured on images besides their rewards: pixels, embeddings, one value a prompt."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch

from alignprop_cli.config.guard import RIGHT
from alignprop_cli.evaluation.draw import Sample, Samples
from alignprop_cli.evaluation.measures import measure, pixel_features, pixels


def test_saturation_is_that_of_hsv_and_clipped_values_are_counted() -> None:
    images = np.random.default_rng(0).integers(1, 255, size=(2, 3, 4, 3)).astype(np.uint8)
    images[0, 0, 0] = (0, 255, 7)
    images[1] = 0
    found = pixels(images)
    flat = images[0].reshape(-1, 3) / 255.0
    assert found["saturation"][0] == pytest.approx(
        np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in flat])
    )
    # Two of the 3 x 4 x 3 values of the first image; all of the black one, which has no colour.
    assert found["clipped"] == pytest.approx([2 / 36, 1.0])
    assert found["saturation"][1] == 0.0


def test_the_pixel_embedding_knows_equal_images_from_opposite_ones() -> None:
    black, white = torch.zeros(1, 3, 20, 20), torch.ones(1, 3, 20, 20)
    grey = torch.full((1, 3, 16, 16), 0.5)
    features = torch.cat([pixel_features(image) for image in (black, white, grey, black)])
    cosines = features @ features.T
    assert torch.allclose(features.norm(dim=1), torch.ones(4))
    assert float(cosines[0, 1]) == pytest.approx(0.0, abs=1e-6)
    assert float(cosines[0, 3]) == pytest.approx(1.0, abs=1e-6)
    # Grey has the constant alone: 1 / sqrt(2), between the two.
    assert [float(cosines[2, i]) for i in (0, 1)] == pytest.approx([0.5**0.5] * 2, abs=1e-6)


def test_every_measure_has_one_value_a_prompt_and_the_spread_of_the_images() -> None:
    prompts = ("one small red circle on a white background", "two large blue squares")
    samples = tuple(Sample(prompts[i % 2], 7 - i % 2, i // 2) for i in range(4))
    rewards = {"clip": np.array([1.0, 2.0, 3.0, 5.0])}
    features = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    images = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    found = measure(Samples(samples, images, rewards, features))
    # The prompt of index 6 comes first; its images are the second and the fourth.
    assert found["clip"].by_prompt.tolist() == [3.5, 2.0]
    assert found["clip"].spread == pytest.approx(np.std([1, 2, 3, 5]))
    assert found["clip"].mean == 2.75
    # In the order in which the prompts were given: orthogonal, then equal images.
    assert sorted(found["diversity"].by_prompt) == pytest.approx([0.0, 1.0])
    assert sorted(found["vendi"].by_prompt) == pytest.approx([1.0, 2.0])
    # By their pixels all images are the same.
    assert found["pixel_diversity"].by_prompt == pytest.approx([0.0, 0.0], abs=1e-6)
    without = measure(Samples(samples, images, rewards))
    assert without["diversity"].by_prompt == pytest.approx([0.0, 0.0], abs=1e-6)
    # No checker knows images of this size.
    assert RIGHT not in found
