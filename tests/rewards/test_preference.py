"""aesthetic, hps and pickscore on small checkpoints in the published formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.images import CLIP_MEAN, CLIP_STD
from alignprop_cli.rewards import hps
from alignprop_cli.rewards.aesthetic import AestheticReward, affine
from alignprop_cli.rewards.clip import ClipReward
from alignprop_cli.rewards.frozen import FrozenReward
from alignprop_cli.rewards.hps import HpsReward
from alignprop_cli.rewards.pickscore import PickScore
from tests.factories import (
    aesthetic_head,
    generator,
    open_clip_config,
    randn,
    small_clip,
    small_tokenizer,
)

PUBLISHED_HEAD = Path(__file__).parents[3] / "shared" / "data" / "aesthetic-head.pth"
PROMPTS = ["a cat", "two dogs", "a boat"]
CPU = torch.device("cpu")
WIDTH, SIZE, FEATURES = 32, 32, 16


def pictures(height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand((3, 3, height, width), generator=generator(0), dtype=dtype)


def transformers_clip(folder: Path) -> Path:
    """Write a CLIP with random weights and its tokenizer in transformers' format."""
    end = small_tokenizer(folder).convert_tokens_to_ids("<|endoftext|>")
    tower: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": FEATURES,
    }
    config = CLIPConfig(
        text_config=CLIPTextConfig(
            **tower,
            vocab_size=end + 1,
            max_position_embeddings=16,
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
        ).to_dict(),
        vision_config=CLIPVisionConfig(**tower, image_size=SIZE, patch_size=8).to_dict(),
        projection_dim=FEATURES,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config)
    for number, parameter in enumerate(model.parameters()):  # biases too
        parameter.data += 0.02 * randn(number, *parameter.shape, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return transformers_clip(tmp_path_factory.mktemp("transformers_clip"))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("head") / "aesthetic-model.pth"
    torch.save(aesthetic_head(FEATURES), file)
    return file


@pytest.fixture(scope="module")
def hps_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small HPS: its architecture is put in place by `small_hps`."""
    folder = tmp_path_factory.mktemp("hps")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = open_clip.CLIP(**open_clip_config(image_size=SIZE)).state_dict()
    torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    return folder


@pytest.fixture
def small_hps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import json

    file = tmp_path / "small-hps.json"
    file.write_text(json.dumps(open_clip_config(image_size=SIZE)), encoding="utf-8")
    known = dict(open_clip.factory._MODEL_CONFIGS)
    open_clip.add_model_config(file)
    monkeypatch.setattr(hps, "ARCHITECTURE", "small-hps")
    yield
    open_clip.factory._MODEL_CONFIGS.clear()
    open_clip.factory._MODEL_CONFIGS.update(known)


@pytest.fixture(params=["aesthetic", "hps", "pickscore", "clip"])
def make(
    request: pytest.FixtureRequest,
    clip_folder: Path,
    head: Path,
    hps_file: Path,
    small_hps: None,
    tmp_path: Path,
) -> Callable[[], FrozenReward]:
    return {
        "aesthetic": lambda: AestheticReward(str(head), str(clip_folder)),
        "hps": lambda: HpsReward(weights=str(hps_file)),
        "pickscore": lambda: PickScore(str(clip_folder), str(clip_folder)),
        "clip": lambda: ClipReward(str(small_clip(tmp_path))),
    }[request.param]


# --- The contract ---


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 31), (96, 1024), (512, 512)])
def test_one_finite_number_per_image_with_a_gradient_for_each(
    make: Callable[[], Any], height: int, width: int
) -> None:
    images = pictures(height, width).requires_grad_()
    rewards = make()(images, PROMPTS)
    assert rewards.shape == (3,)
    assert rewards.dtype == torch.float32
    (gradient,) = torch.autograd.grad(rewards.sum(), [images])
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).norm(dim=1) > 1e-6).all()


def test_it_is_the_same_alone_and_in_a_batch(make: Callable[[], Any]) -> None:
    reward = make()
    images = pictures(40, 48)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, reward(images, PROMPTS), rtol=1e-5, atol=1e-5)


def test_gradcheck(make: Callable[[], Any]) -> None:
    reward = make().to(CPU, torch.float64)
    images = pictures(8, 9, torch.float64)[:1].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: reward(x, PROMPTS[:1]), [images], fast_mode=True, atol=1e-6
    )


def test_it_is_frozen_and_float32_under_autocast(make: Callable[[], Any]) -> None:
    reward = make()
    for module in (*reward.networks, *reward.heads):
        assert not any(part.training for part in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
    images = pictures(SIZE, SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = reward(images, PROMPTS)
    torch.testing.assert_close(under, make()(images, PROMPTS))


def test_in_half_precision_the_answer_is_float32_and_near(make: Callable[[], Any]) -> None:
    images = pictures(SIZE, SIZE).requires_grad_()
    exact = make()(images, PROMPTS)
    half = make().to(CPU, torch.bfloat16)
    rewards = half(images, PROMPTS)
    assert rewards.dtype == torch.float32
    # Three digits of bfloat16, relative to the spread that features can have.
    scale = float(exact.detach().abs().max())
    torch.testing.assert_close(rewards, exact, rtol=0.0, atol=0.05 * scale + 0.02)
    assert len(set(rewards.tolist())) == 3
    (gradient,) = torch.autograd.grad(rewards.sum(), [images])
    assert (gradient.flatten(1).norm(dim=1) > 1e-6).all()


def test_recomputing_changes_no_number_and_stores_less(make: Callable[[], Any]) -> None:
    def run(reward: Any) -> tuple[Tensor, Tensor, int]:
        images = pictures(SIZE, SIZE).requires_grad_()
        stored: set[int] = set()
        weights = {p.data_ptr() for network in reward.networks for p in network.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in weights:
                stored.add(tensor.data_ptr())
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            rewards = reward(images, PROMPTS)
        (gradient,) = torch.autograd.grad(rewards.sum(), [images])
        return rewards.detach(), gradient, sum(sizes.values())

    plain, again = make(), make()
    plain(pictures(SIZE, SIZE), PROMPTS)  # texts are cached before anything is counted
    again(pictures(SIZE, SIZE), PROMPTS)
    again.recompute()
    for before, after in zip(run(plain)[:2], run(again)[:2], strict=True):
        assert torch.equal(before, after)
    assert run(again)[2] < 0.7 * run(plain)[2]


# --- aesthetic ---


def test_the_score_is_that_of_five_layers_on_open_clips_features(
    clip_folder: Path, head: Path
) -> None:
    """OpenAI's own network, quick GELU, by open_clip; the head layer by layer."""
    reward = AestheticReward(str(head), str(clip_folder))
    tower = open_clip.transformer.VisionTransformer(
        image_size=SIZE,
        patch_size=8,
        width=WIDTH,
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

    images = pictures(SIZE, SIZE)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        values = torch.nn.functional.normalize(tower((images - mean) / std), dim=-1)
        for place in (0, 2, 4, 6, 7):
            layer = torch.load(head)
            values = torch.nn.functional.linear(
                values, layer[f"layers.{place}.weight"], layer[f"layers.{place}.bias"]
            )
    torch.testing.assert_close(reward(images, PROMPTS), values[:, 0], rtol=1e-5, atol=1e-5)


def test_the_prompt_is_not_read(clip_folder: Path, head: Path) -> None:
    reward = AestheticReward(str(head), str(clip_folder))
    images = pictures(SIZE, SIZE)
    assert torch.equal(reward(images, PROMPTS), reward(images, PROMPTS[::-1]))


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


def test_hps_is_the_plain_cosine_of_the_letterboxed_picture(
    hps_file: Path, small_hps: None
) -> None:
    reward = HpsReward(weights=str(hps_file))
    model, tokenizer = reward._model, open_clip.get_tokenizer("ViT-H-14")
    wide = pictures(SIZE // 2, SIZE)
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


def test_pickscore_is_the_formula_on_the_librarys_own_logits(clip_folder: Path) -> None:
    reward = PickScore(str(clip_folder), str(clip_folder))
    model = CLIPModel.from_pretrained(clip_folder).eval()
    model.logit_scale.data.fill_(4.2)
    reward._model.logit_scale.data.fill_(4.2)
    images = pictures(SIZE, SIZE)
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
