"""The reward of docs/rewards.md around Aesthetic Predictor V2.5, beside that package itself.

The package is under AGPL-3.0 and no dependency; .ci/run installs it for this test alone.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from tests.factories import randn

package = pytest.importorskip(
    "aesthetic_predictor_v2_5", reason="aesthetic-predictor-v2-5 is not installed"
)
PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"
PX = 28


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A small encoder and a head with random weights: file of the head, folder of the encoder."""
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=PX,
        patch_size=14,
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": PX, "width": PX}).save_pretrained(folder)
    head = package.siglip_v2_5.AestheticPredictorV2_5Head(config)
    # Larger than at the start, where all images are rated alike.
    weights = OrderedDict((name, 3.0 * value) for name, value in head.state_dict().items())
    torch.save(weights, folder / "head.pth")
    return str(folder / "head.pth"), str(folder)


def test_the_documented_reward_is_the_package_on_its_own_preprocessing(
    files: tuple[str, str],
) -> None:
    [code] = re.findall(r"```python\n(# aesthetic_v25\.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    reward = names["AestheticV25"](*files)
    model, processor = package.convert_v2_5_from_siglip(*files)
    # Of whole numbers in 8 bits, and of the encoder's size: its processor rounds what it resizes.
    pixels = (255.0 * torch.sigmoid(randn(0, 3, 3, PX, PX, dtype=torch.float32))).round()
    images = (pixels / 255.0).requires_grad_()
    found = reward(images, ["a", "b", "c"])
    arrays = [image.permute(1, 2, 0).byte().numpy() for image in pixels]
    with torch.no_grad():
        expected = model(**processor(images=arrays, return_tensors="pt")).logits
    torch.testing.assert_close(found, expected.squeeze(-1), rtol=0.0, atol=1e-4)
    assert float((found.max() - found.min()).detach()) > 1e-2
    found.sum().backward()
    assert images.grad is not None
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
