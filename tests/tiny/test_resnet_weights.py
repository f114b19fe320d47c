"""The second embedded image-text model: size, formats, and that it sees more than the first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from alignprop_cli.config.schema import EMBEDDED_ALIGNERS
from alignprop_cli.errors import ConfigError
from alignprop_cli.models.families import TINY
from alignprop_cli.rewards.clip import EMBEDDED, ClipReward
from alignprop_cli.tiny.make import build, resnet

FOLDER = EMBEDDED["tiny-resnet"]
CPU = torch.device("cpu")


def test_the_weights_are_half_precision_and_at_most_4_megabytes() -> None:
    (file,) = FOLDER.glob("*.safetensors")
    assert file.stat().st_size <= 4e6
    with safe_open(file, "pt") as opened:
        kinds = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    assert kinds == {"F16", "I64"}  # I64: how many batches the batch norms have seen


def test_it_reads_texts_as_the_first_one_does() -> None:
    first, second = (load_file(e / "open_clip_model.safetensors") for e in EMBEDDED.values())
    shared = [name for name in first if not name.startswith("visual.")]
    assert len(shared) > 20
    for name in shared:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.long
@pytest.mark.long
def test_it_tells_what_few_step_images_show_more_often_than_the_first(tmp_path: Path) -> None:
    card = json.loads((TINY.parent / "card.json").read_text())["resnet"]
    assert card["few_step_images"] == 1000
    few = build.load_flow(TINY.parent, CPU, build.FEWSTEP)
    found = {}
    for folder in EMBEDDED.values():
        model = build.load_aligner(folder)
        with torch.no_grad():
            found[folder.name] = resnet.measure(model, few, tmp_path, 192)
        for name, share in card["what_is_seen_first"][folder.name].items():
            # Shares of 192 images scatter by .036 at most, one standard deviation.
            assert abs(found[folder.name][name] - share) < 0.12, (folder.name, name)
    assert found["aligner_resnet"]["all"] > found["aligner"]["all"] + 0.05


def test_the_reward_is_the_cosine_of_its_features_on_images_at_twice_their_size() -> None:
    reward = ClipReward("tiny-resnet")
    images = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    images.requires_grad_(True)
    prompts = ["two small red circles on a dark blue background"] * 3
    rewards = reward(images, prompts)
    model = build.load_aligner(FOLDER)
    enlarged = torch.nn.functional.interpolate(
        images.detach(), size=(96, 96), mode="bicubic", antialias=True
    )
    seen = model.encode_image((enlarged - 0.5) / 0.25, normalize=True)
    read = reward.text_features(prompts[:1])
    assert torch.allclose(rewards, (seen @ read.T)[:, 0], atol=1e-5)
    (gradient,) = torch.autograd.grad(rewards.sum(), images)
    assert (gradient != 0).any(dim=1).all()


def test_the_embedded_names_are_those_of_the_configuration() -> None:
    assert tuple(EMBEDDED) == EMBEDDED_ALIGNERS
    with pytest.raises(ConfigError, match="Did you mean 'tiny-resnet'"):
        ClipReward("tiny-resnt")


@pytest.mark.long
def test_its_training_changes_the_images_side_alone_and_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in {"GENERATED": 64, "DRAWINGS": 64, "AUTOENCODED": 32}.items():
        monkeypatch.setattr(resnet, name, count)
    few = build.load_flow(TINY.parent, CPU, build.FEWSTEP)
    first = build.load_aligner(EMBEDDED["tiny"])
    start = resnet.new_model(first).state_dict()
    states = []
    # In one go, and with a break after the first batch.
    for folder, stops in (("whole", [2]), ("parts", [1, 2])):
        work = tmp_path / folder
        work.mkdir()
        for stop in stops:
            monkeypatch.setattr(resnet.aligner, "learning_rate", lambda step, steps: 1e-3)
            model = resnet.train(first, few, work, CPU, stop)
        states.append(model.state_dict())
    changed = {name for name, value in states[0].items() if not torch.equal(value, start[name])}
    assert changed
    assert all(name.startswith("visual.") for name in changed)
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
