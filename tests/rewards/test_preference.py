"""aesthetic, hps and pickscore on small checkpoints in the published formats."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from transformers import CLIPModel

from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.images import CLIP_MEAN, CLIP_STD
from alignprop_cli.rewards import clip, hps
from alignprop_cli.rewards.aesthetic import AestheticReward, affine
from alignprop_cli.rewards.clip import ClipReward
from alignprop_cli.rewards.hps import HpsReward
from alignprop_cli.rewards.hps_official import OfficialHps
from alignprop_cli.rewards.pickscore import PickScore
from tests.factories import aesthetic_head, generator, open_clip_config, small_clip
from tests.rewards.small import (
    FEATURES,
    SIZE,
    head_file,
    hps_weights,
    noise,
    shrink_hps,
    transformers_clip,
)

PUBLISHED_HEAD = Path(__file__).parents[3] / "shared" / "data" / "aesthetic-head.pth"
PROMPTS = ["a cat", "two dogs", "a boat"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return transformers_clip(tmp_path_factory.mktemp("transformers_clip"))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return head_file(tmp_path_factory.mktemp("head"))


@pytest.fixture
def small_hps(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_hps(monkeypatch)


# --- aesthetic ---


def test_the_score_is_that_of_five_layers_on_open_clips_features(
    clip_folder: Path, head: Path
) -> None:
    """OpenAI's own network, quick GELU, by open_clip; the head layer by layer."""
    reward = AestheticReward(str(head), str(clip_folder))
    tower = open_clip.transformer.VisionTransformer(
        image_size=SIZE,
        patch_size=8,
        width=32,
        layers=2,
        heads=2,
        mlp_ratio=2.0,
        output_dim=FEATURES,
        act_layer=open_clip.transformer.QuickGELU,
    ).eval()
    source = dict(reward._model.state_dict())
    state = {
        "class_embedding": source["vision_model.embeddings.class_embedding"],
        "positional_embedding": source["vision_model.embeddings.position_embedding.weight"],
        "conv1.weight": source["vision_model.embeddings.patch_embedding.weight"],
        "proj": source["visual_projection.weight"].T,
    }
    for mine, theirs in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        for part in ("weight", "bias"):
            state[f"{mine}.{part}"] = source[f"vision_model.{theirs}.{part}"]
    for index in range(2):
        mine, theirs = f"transformer.resblocks.{index}", f"vision_model.encoder.layers.{index}"
        for part in ("weight", "bias"):
            state[f"{mine}.attn.in_proj_{part}"] = torch.cat(
                [source[f"{theirs}.self_attn.{which}_proj.{part}"] for which in "qkv"]
            )
            for a, b in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                state[f"{mine}.{a}.{part}"] = source[f"{theirs}.{b}.{part}"]
    tower.load_state_dict(state, strict=True)

    images = noise(SIZE, SIZE)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        values = torch.nn.functional.normalize(tower((images - mean) / std), dim=-1)
        for place in (0, 2, 4, 6, 7):
            layer = torch.load(head)
            values = torch.nn.functional.linear(
                values, layer[f"layers.{place}.weight"], layer[f"layers.{place}.bias"]
            )
    torch.testing.assert_close(reward(images, PROMPTS), values[:, 0], rtol=1e-5, atol=1e-5)


def test_the_published_head_is_the_affine_map_that_is_known_of_it() -> None:
    if not PUBLISHED_HEAD.is_file():
        pytest.skip(f"the published head is not at {PUBLISHED_HEAD}")
    state = torch.load(PUBLISHED_HEAD, map_location="cpu", weights_only=True)
    weight, bias = affine(state)
    assert weight.shape == (768,)
    assert float(weight.norm()) == pytest.approx(17.996, abs=5e-4)
    assert float(bias) == pytest.approx(5.2366, abs=5e-5)
    # The layers one after the other, as its own code runs them.
    features = torch.nn.functional.normalize(torch.randn(64, 768, generator=generator(0)), dim=-1)
    values = features
    for place in (0, 2, 4, 6, 7):
        values = torch.nn.functional.linear(
            values, state[f"layers.{place}.weight"], state[f"layers.{place}.bias"]
        )
    together = (features.double() @ weight + bias).float()
    torch.testing.assert_close(together, values[:, 0], rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: state.pop("layers.4.bias"), r"it lacks layers\.4\.bias \(1 names differ\)"),
        (lambda state: state.update({"layers.1.bias": torch.zeros(3)}), r"unknown layers\.1\.bias"),
        (
            lambda state: state.update({"layers.0.weight": torch.zeros(24, FEATURES + 1)}),
            f"it reads {FEATURES + 1} features, .* has {FEATURES}",
        ),
    ],
)
def test_a_head_of_another_kind_is_refused(
    clip_folder: Path, tmp_path: Path, change: Callable[[Any], object], match: str
) -> None:
    state = aesthetic_head(FEATURES)
    change(state)
    torch.save(state, tmp_path / "head.pth")
    with pytest.raises(AssetError, match=rf"reward\.aesthetic\.head: cannot load .*{match}"):
        AestheticReward(str(tmp_path / "head.pth"), str(clip_folder))


# --- hps ---


def test_hps_is_the_plain_cosine_of_the_letterboxed_image(tmp_path: Path, small_hps: None) -> None:
    reward = HpsReward(weights=str(hps_weights(tmp_path)))
    model, tokenizer = reward._model, open_clip.get_tokenizer("ViT-H-14")
    wide = noise(SIZE // 2, SIZE)
    padded = torch.zeros(3, 3, SIZE, SIZE)
    padded[:, :, SIZE // 4 : SIZE // 4 + SIZE // 2] = wide
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        seen = model.encode_image((padded - mean) / std)
        read = model.encode_text(tokenizer(PROMPTS))
        cosine = torch.nn.functional.cosine_similarity(seen, read)
        torch.testing.assert_close(reward(wide, PROMPTS), cosine)


def test_the_architecture_of_hps_is_the_published_one() -> None:
    """The sizes of ViT-H-14 in Wu et al.'s repository, whose checkpoint loads strictly."""
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config(hps.ARCHITECTURE))
    assert len(model.state_dict()) == 686
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(986.1e6, abs=0.05e6)


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward\.hps\.version: unknown version 'v2\.2'"):
        HpsReward("v2.2")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, small_hps: None) -> None:
    state = open_clip.CLIP(**open_clip_config(image_size=SIZE, width=64)).state_dict()
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": state}, file)
    with pytest.raises(AssetError, match=r"reward\.hps\.weights: cannot load .*HPS_v2\.1"):
        HpsReward(weights=str(tmp_path))
    file.write_bytes(b"half a file")
    with pytest.raises(AssetError, match=r"reward\.hps\.weights: cannot load"):
        HpsReward(weights=str(file))


# --- pickscore ---


@pytest.mark.parametrize("damage", ["text", "cut", "empty", "shape", "lacks", "no state"])
def test_a_checkpoint_of_hps_is_looked_at_before_a_network_is_built(
    tmp_path: Path, small_hps: None, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    file = hps_weights(tmp_path) / hps.FILES["v2.1"]
    state = torch.load(file, weights_only=True)
    name = sorted(state["state_dict"])[-1]
    if damage in ("text", "empty"):
        file.write_bytes(b"no weights" if damage == "text" else b"")
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-2000])
    elif damage == "shape":
        torch.save({"state_dict": state["state_dict"] | {name: torch.ones(3, 3, 3)}}, file)
    elif damage == "lacks":
        del state["state_dict"][name]
        torch.save(state, file)
    else:
        torch.save([1], file)

    def build(*_: object, **__: object) -> None:
        raise AssertionError("a network was built")

    monkeypatch.setattr(hps.open_clip, "create_model", build)
    with pytest.raises(AssetError, match=r"reward\.hps\.weights: cannot load ") as raised:
        HpsReward(weights=str(file))
    assert str(file) in raised.value.message
    assert "\n" not in raised.value.message


def test_an_image_text_model_without_weights_is_refused(tmp_path: Path) -> None:
    folder = small_clip(tmp_path / "clip")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(AssetError, match=r"reward\.clip\.model: cannot load"):
        ClipReward(model=str(folder))


def test_a_file_of_weights_that_is_not_there_is_said_before_a_network_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(*_: object, **__: object) -> None:
        raise AssertionError("a network was built")

    monkeypatch.setattr(clip.open_clip, "create_model", build)
    for place in ("none.pt", "opnai"):
        with pytest.raises(AssetError, match=r"reward\.clip\.pretrained: .* neither a file nor a"):
            ClipReward(model="ViT-B-32", pretrained=place)


def test_pickscore_keeps_its_scale_in_half_precision(clip_folder: Path) -> None:
    reward = PickScore(str(clip_folder), str(clip_folder))
    # The published one is 100, of which bfloat16 would make exp(4.59375) = 98.9.
    reward.networks[0].logit_scale.data.fill_(math.log(100.0))
    reward.to(torch.device("cpu"), torch.bfloat16)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["a cat", "a red dog"]
    cosines = (reward.see(images) * reward.text_features(prompts)).sum(dim=-1)
    torch.testing.assert_close(reward(images, prompts), 100.0 * cosines, rtol=1e-5, atol=0.0)


def test_pickscore_is_the_formula_on_the_librarys_own_logits(clip_folder: Path) -> None:
    reward = PickScore(str(clip_folder), str(clip_folder))
    model = CLIPModel.from_pretrained(clip_folder).eval()
    model.logit_scale.data.fill_(4.2)
    reward._model.logit_scale.data.fill_(4.2)
    images = noise(SIZE, SIZE)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    tokens = reward._tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        output = model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=(images - mean) / std,
        )
    torch.testing.assert_close(
        reward(images, PROMPTS), output.logits_per_image.diagonal(), rtol=1e-5, atol=1e-5
    )


def test_tensors_that_are_missing_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = transformers_clip(tmp_path)
    weights = folder / "model.safetensors"
    state = load_file(weights)
    del state["visual_projection.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(AssetError, match=r"reward\.pickscore\.model: .*lacks visual_projection"):
        PickScore(str(folder), str(folder))


@pytest.mark.parametrize(
    ("build", "option"),
    [
        (lambda: AestheticReward("nobody/nothing"), "reward.aesthetic.head"),
        (lambda: HpsReward(weights="nobody/nothing"), "reward.hps.weights"),
        (lambda: PickScore("nobody/nothing"), "reward.pickscore.model"),
    ],
)
def test_without_the_network_the_message_names_the_option(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[], object], option: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError, match="cannot load nobody/nothing") as caught:
        build()
    assert str(caught.value).startswith(option)
    assert caught.value.hint == f"set {option} to a local copy"


@pytest.mark.parametrize(
    ("fault", "hint"),
    [
        ('ModuleNotFoundError("No module named tkinter", name="tkinter")', "install .* tkinter"),
        ('FileNotFoundError("bpe_simple_vocab_16e6.txt.gz")', "copy bpe_simple_vocab_16e6"),
    ],
)
def test_what_the_official_package_lacks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, hint: str
) -> None:
    package = tmp_path / "hpsv2" / "src" / "open_clip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"raise {fault}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("hpsv2", "hpsv2.src", "hpsv2.src.open_clip"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(AssetError, match=r"reward\.hps-official: the package hpsv2") as caught:
        OfficialHps()
    assert re.search(hint, caught.value.hint or "")
