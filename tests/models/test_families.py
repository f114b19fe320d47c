"""A family from outside the package, text encoders that are dropped, and models of the hub."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from torch import Tensor

from alignprop_cli.config.schema import ModelConfig, SampleConfig
from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.guidance import Conditioning, Embeds, Guidance, guided
from alignprop_cli.models import loading, unet
from alignprop_cli.models.base import Family, MetaModel, Model, Parts, Source
from alignprop_cli.models.families import FAMILIES, find, open_model, register, sampler
from alignprop_cli.models.meta import meta_model
from alignprop_cli.models.published import ARCHITECTURES, PUBLISHED
from alignprop_cli.sampling import sample
from alignprop_cli.schedule import NoiseSchedule, Step
from tests.factories import randn, small_pipeline

CPU = torch.device("cpu")


# --- A family of its own: a rectified flow whose network is one matrix ---


class ToyText:
    """One number a prompt: its length."""

    def encode(self, prompts: Sequence[str]) -> list[Embeds]:
        return [Embeds({"length": torch.tensor([float(len(prompt))])}) for prompt in prompts]


class ToyNetwork:
    """latents @ weight + length."""

    def __init__(self, weight: Tensor) -> None:
        self.module: torch.nn.Module = torch.nn.Linear(2, 2, bias=False, device=weight.device)
        self.module.weight = torch.nn.Parameter(weight, requires_grad=False)

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        return 1, height or 2, width or 2

    def schedule(self, steps: int, latent_shape: tuple[int, int, int]) -> NoiseSchedule:
        levels = [1.0 - i / steps for i in range(steps + 1)]
        pairs = itertools.pairwise(levels)
        return NoiseSchedule(tuple(Step(s, 1.0 - s, s, 1.0 - n, n) for s, n in pairs), "flow")

    def predict(self, latents: Tensor, timestep: float, embeds: Embeds) -> Tensor:
        return self.module(latents) + embeds.tensors["length"][:, :, None, None]

    def recompute_blocks(self, on: bool) -> None:
        pass


class ToyDecoder:
    """Three times the only channel."""

    def __init__(self) -> None:
        self.module: torch.nn.Module = torch.nn.Identity()

    def parameters(self) -> list[Tensor]:
        return []

    def decode(self, latents: Tensor, *, recompute: bool = False) -> Tensor:
        return latents.sigmoid().expand(-1, 3, -1, -1)


def toy_parts(source: Source, device: torch.device) -> Parts:
    weight = json.loads((source.path / "weight.json").read_text())
    return Parts(ToyNetwork(torch.tensor(weight, dtype=source.dtype, device=device)), ToyDecoder())


def toy_on_meta(source: Source) -> MetaModel:
    embeds = Embeds({"length": torch.empty(1, 1, device="meta")})
    parts = Parts(ToyNetwork(torch.empty(2, 2, device="meta")), ToyDecoder())
    return MetaModel(parts, Conditioning(embeds, embeds), lambda shape: (shape[1], shape[2]))


TOY = Family(
    name="Toy",
    pipeline_class="ToyPipeline",
    lora_prefix="network.",
    target_modules=("weight",),
    load_text_encoders=lambda source, device: ToyText(),
    load_parts=toy_parts,
    on_meta=toy_on_meta,
    guidance_origin="text",
)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a model whose family a test may register."""
    monkeypatch.setitem(FAMILIES, "ToyPipeline", TOY)
    del FAMILIES["ToyPipeline"]  # until the test registers it; gone again afterwards
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "ToyPipeline"}')
    (folder / "weight.json").write_text("[[0.5, 0.25], [0.0, 1.0]]")
    return folder


def test_a_registered_family_is_found_opened_and_sampled(toy: Path) -> None:
    config = ModelConfig(id=str(toy))
    with pytest.raises(ConfigError, match=r"is a ToyPipeline; supported: StableDiffusionPipeline"):
        find(config)
    register(TOY)
    assert find(config) == (TOY, toy)
    model = open_model(config, ["cat", "house", "cat"], CPU)
    assert (model.id, model.family, list(model.embeds)) == (str(toy), TOY, ["cat", "house"])

    network = model.network
    chain = sampler(SampleConfig(guidance_scale=2.0, num_inference_steps=1), model.family)
    assert chain.guidance.origin == "text"
    shape = network.latent_shape(None, None)
    schedule = network.schedule(chain.num_inference_steps, shape)
    noise = randn(0, 2, *shape, dtype=torch.float32)
    denoise = guided(network.predict, model.conditioning(["cat", "house"], "cat"), chain.guidance)
    images = model.decoder.decode(sample(denoise, noise, schedule))
    # A step of the flow takes away the velocity c + 2 (c - u): lengths 3 and 5 against 3.
    weight = torch.tensor([[0.5, 0.25], [0.0, 1.0]])
    length = torch.tensor([3.0 + 2.0 * 0.0, 5.0 + 2.0 * 2.0])[:, None, None, None]
    expected = (noise - (noise @ weight.T + length)).sigmoid().expand(-1, 3, -1, -1)
    torch.testing.assert_close(images, expected)

    made = meta_model(config, torch.float32)
    assert made.parts.network.module.weight.is_meta
    assert made.image_size((1, 4, 6)) == (4, 6)


def test_a_family_without_a_row_lists_what_is_supported(toy: Path) -> None:
    register(TOY)
    (toy / "model_index.json").write_text('{"_class_name": ["pipeline", "Custom"]}')
    with pytest.raises(ConfigError) as caught:
        find(ModelConfig(id=str(toy)))
    assert "is a ['pipeline', 'Custom']; supported: " in caught.value.message
    assert "StableDiffusionPipeline (Stable Diffusion 1.x and 2.x)" in caught.value.message
    assert "ToyPipeline (Toy)" in caught.value.message


# --- Prompts are encoded, then their encoders are gone ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pipeline(tmp_path_factory.mktemp("sd") / "model")


def test_the_text_encoders_come_without_the_network_and_the_network_without_them(
    folder: Path, tmp_path: Path
) -> None:
    text, parts = (Path(shutil.copytree(folder, tmp_path / name)) for name in ("text", "parts"))
    for part in ("unet", "vae"):
        shutil.rmtree(text / part)
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(parts / part)
    source = Source(ModelConfig(id="x"), text, torch.float32)
    assert len(unet.load_text_encoders(source, CPU).encode(["a", "b"])) == 2
    # Who asks for no prompt needs no encoder.
    model = open_model(ModelConfig(id=str(parts)), [], CPU)
    assert model.fingerprint == open_model(ModelConfig(id=str(folder)), ["a"], CPU).fingerprint


def test_each_distinct_prompt_is_encoded_once_and_others_are_unknown(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    encode = unet.ClipText.encode

    def spy(self: unet.ClipText, prompts: Sequence[str]) -> list[Embeds]:
        asked.extend(prompts)
        return encode(self, prompts)

    monkeypatch.setattr(unet.ClipText, "encode", spy)
    prompts = iter(["cat", "dog", "cat", "", "dog"])
    model = open_model(ModelConfig(id=str(folder)), prompts, CPU)
    assert asked == ["cat", "dog", ""]
    assert all(embeds.tensors["hidden"].ndim == 2 for embeds in model.embeds.values())
    conditioning = model.conditioning(["dog", "cat", "dog"], "")
    assert asked == ["cat", "dog", ""]
    hidden = conditioning.text.tensors["hidden"]
    for row, prompt in zip(hidden, ("dog", "cat", "dog"), strict=True):
        assert torch.equal(row, model.embeds[prompt].tensors["hidden"])
    with pytest.raises(KeyError, match="bird"):
        model.conditioning(["cat", "bird"], "")
    with pytest.raises(KeyError, match="blurry"):
        model.conditioning(["cat"], "blurry")


# --- Models of the hub ---


def put_in_cache(folder: Path, cache: Path, name: str, commit: str = "0" * 40) -> Path:
    """Lay a model out as the hub's cache has it, as the main branch of a repository."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(folder, repository / "snapshots" / commit))


def test_a_model_in_the_cache_of_the_hub_is_opened_offline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    put_in_cache(folder, tmp_path, "own/model")
    config = ModelConfig(id="own/model")
    assert find(config) == (FAMILIES["StableDiffusionPipeline"], None)
    model = open_model(config, ["cat"], CPU)
    expected = open_model(ModelConfig(id=str(folder)), ["cat"], CPU)
    assert draw(model).equal(draw(expected))
    assert meta_model(config, torch.float32).parts.network.latent_shape(16, 24) == (4, 8, 12)
    with pytest.raises(AssetError, match=r"model\.id: other/model: it is not in the cache"):
        open_model(ModelConfig(id="other/model"), ["cat"], CPU)


def draw(model: Model) -> Tensor:
    shape = model.network.latent_shape(None, None)
    denoise = guided(model.network.predict, model.conditioning(["cat"], None), Guidance(1.0))
    noise = randn(0, 1, *shape, dtype=torch.float32)
    with torch.no_grad():
        return model.decoder.decode(sample(denoise, noise, model.network.schedule(2, shape)))


def test_another_family_on_the_hub_is_refused_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "HunyuanDiTPipeline"}')
    asked: list[tuple[Any, ...]] = []

    def download(*arguments: Any, **options: Any) -> str:
        asked.append((*arguments, options))
        return str(index)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was downloaded")

    monkeypatch.setattr(loading, "hf_hub_download", download)
    monkeypatch.setattr(DiffusionPipeline, "download", refuse)
    with pytest.raises(ConfigError, match="a/b is a HunyuanDiTPipeline; supported: "):
        open_model(ModelConfig(id="a/b", revision="v2"), ["cat"], CPU)
    assert asked == [("a/b", "model_index.json", {"revision": "v2"})]


# The pipeline, pixels, width of the text embeddings and parameters of the network (as published:
# 0.860, 0.866 and 2.567 billion; the input for the guidance scale adds 256 x 320).
EXPECTED = {
    "sd-1.5": ("StableDiffusionPipeline", 512, 768, 859_520_964),
    "sd-2.1": ("StableDiffusionPipeline", 768, 1024, 865_910_724),
    "sd-2.1-base": ("StableDiffusionPipeline", 512, 1024, 865_910_724),
    "sd-turbo": ("StableDiffusionPipeline", 512, 1024, 865_910_724),
    "lcm-dreamshaper-v7": ("LatentConsistencyModelPipeline", 768, 768, 859_520_964 + 256 * 320),
    "sdxl": ("StableDiffusionXLPipeline", 1024, 2048, 2_567_463_684),
    "sdxl-turbo": ("StableDiffusionXLPipeline", 512, 2048, 2_567_463_684),
}


# Rectified flows: tests/models/test_flow.py.
@pytest.mark.parametrize("name", sorted(n for n, place in PUBLISHED.items() if place in EXPECTED))
def test_published_models_are_planned_without_the_hub(name: str) -> None:
    config = ModelConfig(id=name)
    family, path = find(config)
    kind, size, width, parameters = EXPECTED[PUBLISHED[name]]
    assert (family.pipeline_class, path) == (kind, None)
    made = meta_model(config, torch.bfloat16)
    assert sum(p.numel() for p in made.parts.network.module.parameters()) == parameters
    assert made.image_size(made.parts.network.latent_shape(None, None)) == (size, size)
    negative = made.conditioning.negative
    assert negative is not None
    for embeds in (made.conditioning.text, negative):
        assert embeds.tensors["hidden"].shape == (1, 77, width)
    everything = [
        *made.parts.network.module.parameters(),
        *made.parts.decoder.module.parameters(),
        *embeds.tensors.values(),
    ]
    assert all(tensor.is_meta and tensor.dtype == torch.bfloat16 for tensor in everything)


def test_on_meta_the_network_is_the_loaded_one_without_its_numbers() -> None:
    config = ModelConfig(id="tiny")
    made = meta_model(config, torch.float32).parts
    model = open_model(config, [], CPU)
    for empty, loaded in ((made.network, model.network), (made.decoder, model.decoder)):
        shapes = [
            {name: (p.shape, p.dtype, p.stride()) for name, p in part.module.named_parameters()}
            for part in (empty, loaded)
        ]
        assert shapes[0] == shapes[1]
    shape = model.network.latent_shape(None, None)
    assert made.network.schedule(7, shape) == model.network.schedule(7, shape)


def test_every_shipped_architecture_belongs_to_a_published_model() -> None:
    shipped = {path.parent.name for path in ARCHITECTURES.glob("*/model_index.json")}
    assert shipped == set(PUBLISHED.values()) == {path.name for path in ARCHITECTURES.iterdir()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny", r"model\.t5: none: Stable Diffusion 1\.x and 2\.x has no T5"),
        ("stabilityai/sdxl-turbo", r"model\.t5: none: Stable Diffusion XL has no T5"),
        ("black-forest-labs/FLUX.2-klein-4B", r"model\.t5: none: FLUX\.2-klein has no T5"),
        ("Tongyi-MAI/Z-Image-Turbo", r"model\.t5: none: Z-Image has no T5"),
        ("black-forest-labs/FLUX.1-dev", r"model\.t5: none: FLUX\.1 cannot do without T5"),
    ],
)
def test_t5_can_be_left_out_of_stable_diffusion_3_alone(name: str, message: str) -> None:
    config = ModelConfig(id=name, t5="none")
    for door in (
        lambda: find(config),
        lambda: meta_model(config, torch.float32),
        lambda: open_model(config, ["a"], CPU),
    ):
        with pytest.raises(ConfigError, match=f"{message}; the option is for Stable Diffusion 3"):
            door()
    assert find(ModelConfig(id="stabilityai/stable-diffusion-3.5-medium", t5="none"))


@pytest.mark.parametrize(
    ("place", "key", "message"),
    [
        ("tiny", "revision", "it is for a hub id, and model.id .* is an embedded model"),
        ("tiny-fewstep", "variant", "a folder or a single file, .* is an embedded model"),
        ("tiny", "config", "it is for a single file, .* is an embedded model"),
        ("folder", "revision", "it is for a hub id, .* is a folder"),
        ("folder", "config", "it is for a single file, .* is a folder"),
        ("single file", "revision", "it is for a hub id, .* is a single file"),
        ("stabilityai/sdxl-turbo", "config", "it is for a single file, .* is a hub id"),
    ],
)
def test_an_option_for_another_kind_of_model_is_refused(
    place: str, key: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    # Neither needs to be a model.
    (tmp_path / "single file").touch()
    name = str(tmp_path / place) if (tmp_path / place).exists() else place
    config = ModelConfig(**{"id": name, key: "x1"})
    for door in (
        lambda: find(config),
        lambda: meta_model(config, torch.float32),
        lambda: open_model(config, [], CPU),
    ):
        with pytest.raises(ConfigError, match=rf"model\.{key}: x1: .*{message}") as caught:
            door()
        assert f"model.{key}=null" in str(caught.value.hint)


def test_options_are_taken_where_they_mean_something(tmp_path: Path) -> None:
    family, _ = find(ModelConfig(id="stabilityai/sdxl-turbo", revision="v2", variant="fp16"))
    assert family.pipeline_class == "StableDiffusionXLPipeline"
    (tmp_path / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    assert find(ModelConfig(id=str(tmp_path), variant="fp16"))[0].name == "Z-Image"
