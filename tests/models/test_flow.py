"""Rectified flows: each family samples, trains and is saved as diffusers' own pipeline has it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    Krea2Pipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor

from alignprop_cli.config.schema import ModelConfig, SampleConfig
from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.estimators import last_k
from alignprop_cli.guidance import Embeds, Guidance, guided
from alignprop_cli.lora import files
from alignprop_cli.lora import layers as lora
from alignprop_cli.models import flux1 as flux1_family
from alignprop_cli.models.base import Model, Source
from alignprop_cli.models.families import find, open_model, sampler
from alignprop_cli.models.flow import FlowTransformer, Sizes
from alignprop_cli.models.meta import meta_model
from alignprop_cli.models.published import PUBLISHED
from alignprop_cli.sampling import ddim_step, sample
from alignprop_cli.schedule import NoiseSchedule
from tests.factories import KeepsFloat64, fill_lora_b, randn, small_pipeline
from tests.flow_models import (
    as_given,
    scale_of,
    small_flux1,
    small_klein,
    small_krea2,
    small_qwen_image,
    small_schnell,
    small_sd3,
    small_zimage,
)

CPU = torch.device("cpu")
PROMPTS = ["a cat", "two small dogs", "x"]
"""Of different length, none of which an encoder cuts."""

STEPS = 3
"""Of a chain: the fewest that have one in the middle."""

CLOSE = {"rtol": 0.0, "atol": 1e-4}


@dataclass(frozen=True)
class Case:
    """A family, and how its small model is made and drawn.

    Args:
        build: Writes the model into a folder.
        pipeline: diffusers' class.
        sizes: (height, width) in pixels.
        layers: Of the network, that the default LoRA changes.
        unguided: The guidance scale that means none.
    """

    build: Callable[..., Path]
    pipeline: Any
    sizes: tuple[tuple[int, int], ...]
    layers: int
    unguided: float = 1.0


SD3 = Case(small_sd3, StableDiffusion3Pipeline, ((16, 16), (8, 20)), 3 * 8 - 1)
KLEIN = Case(small_klein, Flux2KleinPipeline, ((32, 32), (16, 36)), 2 * 4 + 3 * 2)
ZIMAGE = Case(small_zimage, ZImagePipeline, ((64, 64), (32, 80)), 3 * 4, unguided=0.0)
FLUX1 = Case(small_flux1, FluxPipeline, ((16, 16), (8, 20)), 2 * 12 + 3 * 3)
QWEN = Case(small_qwen_image, QwenImagePipeline, ((16, 16), (8, 20)), 2 * 4)
KREA2 = Case(small_krea2, Krea2Pipeline, ((64, 64), (32, 80)), 3 * 5, unguided=0.0)
CASES = {"sd3": SD3, "klein": KLEIN, "flux1": FLUX1, "zimage": ZIMAGE, "qwen": QWEN, "krea2": KREA2}


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case.build(tmp_path_factory.mktemp("flow") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    """Return a loaded model that no test changes."""
    return load(folder)


@pytest.fixture
def fresh(model: Model) -> Model:
    """Return a copy of it that a test may change, without the time of loading."""
    return deepcopy(model)


@pytest.fixture(scope="module")
def pipeline(case: Case, folder: Path) -> Any:
    return pipeline_of(case, folder)


@pytest.fixture(scope="module")
def half(folder: Path) -> Model:
    return load(folder, dtype="bfloat16")


@pytest.fixture(scope="module")
def half_pipeline(case: Case, folder: Path) -> Any:
    return pipeline_of(case, folder, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_sd3(tmp_path_factory.mktemp("sd3") / "model")


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_klein(tmp_path_factory.mktemp("klein") / "model")


@pytest.fixture(scope="module")
def zimage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_zimage(tmp_path_factory.mktemp("zimage") / "model")


@pytest.fixture(scope="module")
def krea2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_krea2(tmp_path_factory.mktemp("krea2") / "model")


@pytest.fixture(scope="module")
def flux1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_flux1(tmp_path_factory.mktemp("flux1") / "model")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_qwen_image(tmp_path_factory.mktemp("qwen") / "model")


def load(path: Path | str, prompts: tuple[str, ...] = (*PROMPTS, ""), **options: str) -> Model:
    return open_model(ModelConfig(id=str(path), **({"dtype": "float32"} | options)), prompts, CPU)


def pipeline_of(case: Case, folder: Path, **options: Any) -> Any:
    pipeline = case.pipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def two_branches(model: Model, scale: float, **options: Any) -> Guidance:
    """Return guidance by two branches, also of a network that takes a scale as an input."""
    embedded = 3.5 if getattr(model.network, "embeds_guidance", False) else None
    return Guidance(scale, embedded=embedded, **options)


def noise(model: Model, size: tuple[int, int], images: int = 3) -> Tensor:
    return randn(3, images, *model.network.latent_shape(*size), dtype=torch.float32)


@torch.no_grad()
def draw(
    model: Model,
    size: tuple[int, int],
    guidance: float = 1.0,
    prompts: list[str] = PROMPTS,
    *,
    steps: int = STEPS,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return (latents, images)."""
    config = SampleConfig(
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=size[0],
        width=size[1],
        **options,
    )
    chain = sampler(config, model.family, model.network)
    start = noise(model, size, len(prompts))
    negative = chain.negative_prompt if chain.guidance.enabled else None
    conditioning = model.conditioning(prompts, negative)
    denoise = guided(model.network.predict, conditioning, chain.guidance)
    latents = sample(denoise, start, chain.schedule(model.network, tuple(start.shape[1:])))
    return latents, model.decoder.decode(latents)


def draw_with_diffusers(
    pipeline: Any,
    model: Model,
    size: tuple[int, int],
    guidance: float = 1.0,
    *,
    steps: int = STEPS,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return the same of plain diffusers, for the same noise."""
    kept: list[Tensor] = []

    def keep(pipeline: Any, i: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept.append(tensors["latents"])
        return tensors

    start = noise(model, size)
    images = pipeline(
        prompt=list(PROMPTS),  # which Z-Image's pipeline writes into
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        latents=as_given(pipeline, start),
        output_type="pt",
        callback_on_step_end=keep,
        **{**scale_of(pipeline, guidance, len(PROMPTS)), **options},
    ).images
    # The pipelines of FLUX, Qwen-Image and Krea 2 pack them: (B, h w, C).
    latents = kept[-1]
    if isinstance(pipeline, FluxPipeline | QwenImagePipeline):
        latents = pipeline._unpack_latents(latents, *size, pipeline.vae_scale_factor)
        latents = latents.view(start.shape)  # without the number of the frame
    elif isinstance(pipeline, Krea2Pipeline):
        latents = pipeline._unpack_latents(latents, *size).squeeze(2)
    elif latents.ndim == 3:
        latents = latents.transpose(1, 2).reshape(start.shape)
    return latents, images


# --- Sampling ---


@pytest.mark.parametrize("guides", [False, True])
def test_samples_equal_those_of_the_familys_own_pipeline(
    case: Case, model: Model, pipeline: Any, guides: bool
) -> None:
    guidance = 4.0 if guides else case.unguided
    for size in case.sizes if guides else case.sizes[1:]:
        ours = draw(model, size, guidance)
        for mine, theirs in zip(
            ours, draw_with_diffusers(pipeline, model, size, guidance), strict=True
        ):
            torch.testing.assert_close(mine, theirs, **CLOSE)
        assert ours[1].shape == (3, 3, *size)
        # The tolerance means something: other prompts and another scale change much more.
        others = draw(model, size, guidance, PROMPTS[::-1])[0]
        assert float((ours[0] - others)[0].abs().max()) > 1e-2
        assert float((ours[0] - draw(model, size, 2.0)[0]).abs().max()) > 1e-2


@pytest.mark.long
def test_the_default_size_is_that_of_the_pipeline(
    case: Case, model: Model, pipeline: Any, folder: Path
) -> None:
    guides = scale_of(pipeline, case.unguided)
    images = pipeline(prompt="x", num_inference_steps=1, output_type="pt", **guides).images
    found = meta_model(ModelConfig(id=str(folder)), torch.float32)
    shape = model.network.latent_shape(None, None)
    assert found.image_size(shape) == tuple(images.shape[-2:])


def test_the_levels_are_exactly_those_that_the_pipeline_steps_through(
    case: Case, model: Model, pipeline: Any
) -> None:
    size = case.sizes[1]
    pipeline(prompt="x", height=size[0], width=size[1], num_inference_steps=6, output_type="latent")
    schedule = model.network.schedule(6, model.network.latent_shape(*size))
    levels = [step.sigma for step in schedule.steps] + [schedule.steps[-1].sigma_next]
    assert levels == pipeline.scheduler.sigmas.tolist()
    assert [step.timestep for step in schedule.steps] == pipeline.scheduler.timesteps.tolist()
    assert schedule.prediction_type == "flow"
    assert all(step.alpha == 1.0 - step.sigma for step in schedule.steps)


def test_linear_spacing_is_the_pipelines_sigmas_argument(
    case: Case, model: Model, pipeline: Any
) -> None:
    size, sigmas = case.sizes[0], np.linspace(1.0, 1.0 / STEPS, STEPS)
    ours = draw(model, size, spacing="linear")
    expected = draw_with_diffusers(pipeline, model, size, sigmas=sigmas.tolist())
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    # But for Stable Diffusion 3 the model's own list is that one already.
    same = torch.allclose(ours[0], draw(model, size)[0], atol=1e-5)
    assert same is (case is not SD3)


@pytest.mark.parametrize("case", [SD3, ZIMAGE], ids=["sd3", "zimage"])
def test_a_dynamic_shift_depends_on_the_size_as_in_the_pipeline(case: Case, tmp_path: Path) -> None:
    options = {"scheduler_use_dynamic_shifting": True, "scheduler_base_image_seq_len": 4}
    folder = case.build(
        tmp_path / "model",
        **options,
        scheduler_max_image_seq_len=40,
        scheduler_shift_terminal=0.1,
    )
    model, pipeline = load(folder), pipeline_of(case, folder)
    for size in case.sizes:
        for mine, theirs in zip(
            draw(model, size), draw_with_diffusers(pipeline, model, size), strict=True
        ):
            torch.testing.assert_close(mine, theirs, **CLOSE)
    shapes = [model.network.latent_shape(*size) for size in case.sizes]
    one, other = (model.network.schedule(4, shape) for shape in shapes)
    assert one != other
    assert one.steps[-1].sigma == pytest.approx(0.1)


@pytest.mark.parametrize("how", ["the model has none", "model.t5: none"])
def test_without_t5_the_network_reads_zeros_as_in_the_pipeline(
    sd3: Path, tmp_path: Path, how: str
) -> None:
    if how == "the model has none":
        sd3, options = small_sd3(tmp_path / "model", t5=False), {}
    else:
        options = {"t5": "none"}
    with_t5, model = load(sd3), load(sd3, **options)
    pipeline = pipeline_of(SD3, sd3, text_encoder_3=None, tokenizer_3=None)
    ours, size = draw(model, SD3.sizes[0]), SD3.sizes[0]
    for mine, theirs in zip(ours, draw_with_diffusers(pipeline, model, size), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    assert torch.equal(ours[0], draw(with_t5, size)[0]) is (not options)


def test_a_distilled_model_is_not_guided_and_says_so(tmp_path: Path) -> None:
    folder = small_klein(tmp_path / "model", is_distilled=True)
    said: list[str] = []
    model = open_model(ModelConfig(id=str(folder)), [*PROMPTS, ""], CPU, said.append)
    assert any("was distilled without guidance" in text for text in said)
    chain = sampler(SampleConfig(guidance_scale=4.0), model.family)
    assert not any(chain.guidance.applies(sigma) for sigma in (0.0, 0.5, 1.0))
    size, pipeline = KLEIN.sizes[0], pipeline_of(KLEIN, folder)
    for mine, theirs in zip(
        draw(model, size, 4.0), draw_with_diffusers(pipeline, model, size, 4.0), strict=True
    ):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    # The planner asks the same row.
    assert not find(ModelConfig(id=str(folder)))[0].guides


def test_the_network_is_given_the_timesteps_of_the_pipeline_bit_for_bit_in_bfloat16(
    case: Case, half: Model, half_pipeline: Any
) -> None:
    seen: list[Tensor] = []

    def spy(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        # Z-Image's is the second argument.
        seen.append(options["timestep"] if "timestep" in options else arguments[1])

    size = case.sizes[0]
    options = {"height": size[0], "width": size[1], **scale_of(half_pipeline, case.unguided)}
    with half_pipeline.transformer.register_forward_pre_hook(spy, with_kwargs=True):
        half_pipeline(prompt="x", num_inference_steps=7, output_type="latent", **options)
    theirs, seen = seen, []
    start = noise(half, size, 1)
    shape = half.network.latent_shape(*size)
    conditioning = half.conditioning(["x"], None)
    denoise = guided(half.network.predict, conditioning, two_branches(half, 1.0))
    with half.network.module.register_forward_pre_hook(spy, with_kwargs=True), torch.no_grad():
        for step in half.network.schedule(7, shape).steps:
            assert denoise(start, step).dtype == start.dtype
    assert len(seen) == len(theirs) == 7
    for mine, expected in zip(seen, theirs, strict=True):
        assert mine.dtype == expected.dtype
        assert torch.equal(mine, expected)


def distance(one: Tensor, other: Tensor) -> float:
    """Return the relative L2 distance."""
    return float((one.float() - other.float()).norm() / other.float().norm())


def test_a_whole_chain_in_bfloat16_is_the_pipelines_but_for_its_rounding_of_the_latents(
    case: Case, model: Model, half: Model, half_pipeline: Any
) -> None:
    """Every step of the pipeline ends by rounding the latents to bfloat16, but for Z-Image's.

    Such a rounding is at most 2^-8 of a value, 2^-8 / sqrt(3) of the norm. Those of 4 steps add up
    as squares, and so do those of two chains that round different numbers, since prompts that are
    encoded together are rounded otherwise than alone: sqrt(2 x 4 / 3) 2^-8 < 2^-7.
    """
    is_rounded, size = case is not ZIMAGE, case.sizes[1]
    dtype = torch.bfloat16 if is_rounded else torch.float32
    theirs = draw_with_diffusers(half_pipeline, half, size, case.unguided, steps=4)[0]
    assert theirs.dtype == dtype
    embedded = case.unguided if getattr(half.network, "embeds_guidance", False) else None
    guidance = Guidance(1.0 if embedded is None else 0.0, embedded=embedded)
    denoise = guided(half.network.predict, half.conditioning(PROMPTS, None), guidance)
    latents = noise(half, size).to(dtype).float()
    for step in half.network.schedule(4, tuple(latents.shape[1:])).steps:
        with torch.no_grad():
            latents = ddim_step(denoise(latents, step), latents, step, "flow").to(dtype).float()
    assert distance(latents, theirs) < (2.0**-7 if is_rounded else 1e-6)
    # Without that rounding, as we sample, the chain is no further from the one in float32.
    ours, exact = (draw(m, size, case.unguided, steps=4)[0] for m in (half, model))
    cost = distance(theirs, exact)
    assert 2.0 * distance(latents, theirs) < cost < 0.1
    assert 0.0 < distance(ours, exact) < 1.1 * cost


def test_a_step_in_half_precision_has_no_nan(case: Case, folder: Path) -> None:
    if case in (ZIMAGE, QWEN):
        with pytest.raises(ConfigError, match=r"model\.dtype: .* overflows in float16"):
            load(folder, dtype="float16")
        return
    model, size = load(folder, dtype="float16"), case.sizes[0]
    targets = model.family.target_modules
    parameters = lora.inject(model.network.module, rank=2, alpha=2, target_modules=targets, seed=0)
    fill_lora_b(model.network.module, seed=1)
    start = noise(model, size)
    # Prompts of different length: what pads them is a source of NaN.
    conditioning = model.conditioning(PROMPTS, "")
    denoise = guided(model.network.predict, conditioning, two_branches(model, 3.0))
    schedule = model.network.schedule(3, tuple(start.shape[1:]))
    images = model.decoder.decode(sample(denoise, start, schedule, path=last_k(3).path((0, 1, 2))))
    assert images.dtype == torch.float32
    # As training scales a loss in float16.
    (2.0**10 * images.mean()).backward()
    found = [p.grad for p in parameters if p.grad is not None]
    assert all(bool(tensor.isfinite().all()) for tensor in (images, *found))
    assert max(float(gradient.norm()) for gradient in found) > 1e-3


@pytest.mark.parametrize("dtype", ["float16", "auto"])
@pytest.mark.parametrize("family", ["zimage", "qwen"])
def test_float16_is_refused_for_a_run_and_its_plan(
    family: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    """It overflows in the published models, as they are in diffusers."""
    folder = request.getfixturevalue(family)
    config = ModelConfig(id=str(folder), dtype=dtype)  # type: ignore[arg-type]
    # On an older GPU auto is float16.
    source, (row, _) = Source(config, folder, torch.float16), find(config)
    for refused in (
        lambda: row.on_meta(source),
        lambda: row.load_parts(source, CPU),
        lambda: row.load_text_encoders(source, CPU),
    ):
        with pytest.raises(ConfigError, match=r"model\.dtype: .* overflows in float16") as caught:
            refused()
        assert "bfloat16" in (caught.value.hint or "")
        assert ("`auto`" in caught.value.message) is (dtype == "auto")


def test_guidance_is_off_outside_its_interval_in_sigma(case: Case, model: Model) -> None:
    size = case.sizes[0]
    start, shape = noise(model, size), model.network.latent_shape(*size)
    conditioning, predict = model.conditioning(PROMPTS, ""), model.network.predict
    denoise = guided(predict, conditioning, two_branches(model, 4.0, interval=(0.3, 0.9)))
    for step in model.network.schedule(6, shape, spacing="linear").steps:  # type: ignore[call-arg]
        plain = guided(predict, conditioning, two_branches(model, 1.0))(start, step)
        inside = 0.3 <= step.sigma <= 0.9
        assert torch.equal(denoise(start, step), plain) is not inside


# --- FLUX.1: a scale that is an input, and true guidance ---


@pytest.mark.parametrize("build", [small_flux1, small_schnell])
def test_true_guidance_is_the_pipelines_with_its_negative_prompt(
    build: Callable[..., Path], tmp_path: Path
) -> None:
    folder, size = build(tmp_path / "model"), FLUX1.sizes[1]
    model, pipeline = load(folder), pipeline_of(FLUX1, folder)
    for negative in ("", "two small dogs"):
        ours = draw(model, size, 2.0, true_guidance_scale=3.0, negative_prompt=negative)
        theirs = draw_with_diffusers(
            pipeline, model, size, 2.0, true_cfg_scale=3.0, negative_prompt=[negative] * 3
        )
        for mine, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, expected, **CLOSE)
    off = draw(model, size, 2.0, true_guidance_scale=1.0)[0]
    assert float((ours[0] - off).abs().max()) > 1e-2
    with pytest.raises(ConfigError, match=r"sample\.negative_prompt: x cannot be obeyed") as caught:
        draw(model, size, 2.0, negative_prompt="x")
    assert "sample.true_guidance_scale above 1" in (caught.value.hint or "")


def test_true_guidance_is_refused_where_the_guidance_scale_is_that_of_two_branches(
    klein: Path,
) -> None:
    family, _ = find(ModelConfig(id=str(klein)))
    with pytest.raises(ConfigError, match=r"true_guidance_scale: 2 is not for FLUX\.2-klein"):
        sampler(SampleConfig(true_guidance_scale=2.0), family)


def test_schnell_takes_no_guidance_scale_and_says_so(tmp_path: Path) -> None:
    folder = small_schnell(tmp_path / "model")
    said: list[str] = []
    model = open_model(ModelConfig(id=str(folder)), [*PROMPTS, ""], CPU, said.append)
    assert any("takes no guidance scale: sample.guidance_scale is not used" in s for s in said)
    pipeline = pipeline_of(FLUX1, folder)
    for size in FLUX1.sizes:
        ours = draw(model, size, 4.0)
        for mine, theirs in zip(ours, draw_with_diffusers(pipeline, model, size, 4.0), strict=True):
            torch.testing.assert_close(mine, theirs, **CLOSE)
        assert torch.equal(ours[0], draw(model, size, 0.0)[0])
    # No shift: equal steps.
    levels = [step.sigma for step in model.network.schedule(4, (8, 8, 8)).steps]
    assert levels == pytest.approx([1.0, 0.75, 0.5, 0.25], abs=1e-6)


def test_the_noise_of_a_seed_is_that_of_the_pipeline_before_it_is_packed(flux1: Path) -> None:
    model, pipeline = load(flux1), pipeline_of(FLUX1, flux1)
    shape = model.network.latent_shape(8, 20)
    packed, _ = pipeline.prepare_latents(
        2, shape[0], 8, 20, torch.float32, CPU, torch.Generator().manual_seed(5)
    )
    ours = torch.randn((2, *shape), generator=torch.Generator().manual_seed(5))
    assert torch.equal(pipeline._unpack_latents(packed, 8, 20, 2), ours)


def test_t5_in_float16_keeps_what_overflows_in_float32(flux1: Path) -> None:
    source = Source(ModelConfig(id="x"), flux1, torch.float16)
    encoders = flux1_family.load_text_encoders(source, CPU)
    kinds = {name: p.dtype for name, p in encoders.t5[1].named_parameters()}
    kept = {name for name, dtype in kinds.items() if dtype == torch.float32}
    assert kept == {name for name in kinds if name.endswith("DenseReluDense.wo.weight")} != set()
    (found,) = encoders.encode(["a cat"])
    for tensor in found.tensors.values():
        assert tensor.dtype == torch.float16
        assert tensor.isfinite().all()


# --- LoRA files ---


def test_a_written_file_changes_the_weights_alike_in_diffusers_and_by_comfyuis_rules(
    case: Case, fresh: Model, folder: Path, tmp_path: Path
) -> None:
    """ComfyUI: strength (alpha / rank, or 1 without `.alpha`) up @ down (comfy/weight_adapter)."""
    model, size = fresh, case.sizes[1]
    module, prefix = model.network.module, model.family.lora_prefix
    lora.inject(module, rank=2, alpha=3, target_modules=model.family.target_modules, seed=0)
    fill_lora_b(module, seed=1)
    trained = {
        name: layer.get_delta_weight(lora.ADAPTER).detach()
        for name, layer in module.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert len(trained) == case.layers
    ours, pipeline = draw(model, size), pipeline_of(case, folder)
    for made in ("diffusers", "comfyui"):
        place = tmp_path / made
        place.mkdir()
        metadata = lora.adapter_metadata(module)
        file = files.save(place, lora.weights(module), {}, prefix=prefix, adapter_metadata=metadata)
        if made == "comfyui":
            layers = files.read(file).layers
            files.save_for_comfyui(file, layers, {}, prefix=prefix, title="t")
        state, read = load_file(file), files.read(file).layers
        pipeline.load_lora_weights(place)
        for name, delta in trained.items():
            up, down = (state[f"{prefix}{name}.lora_{half}.weight"] for half in "BA")
            alpha = state.get(f"{prefix}{name}.alpha")
            strength = 1.0 if alpha is None else float(alpha) / len(down)
            loaded = pipeline.transformer.get_submodule(name).get_delta_weight("default_0")
            for found in (strength * up @ down, loaded.detach(), read[name].delta().float()):
                torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-7)
        expected = draw_with_diffusers(pipeline, model, size)
        for mine, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, theirs, **CLOSE)
        pipeline.unload_lora_weights()


# --- Gradients ---


def in_float64(model: Model) -> list[torch.nn.Parameter]:
    """Put a LoRA that changes something into the model, turn all of it to float64."""
    module, decoder = model.network.module, model.decoder.module
    targets = model.family.target_modules
    parameters = lora.inject(module, rank=2, alpha=4, target_modules=targets, seed=0)
    fill_lora_b(module, seed=1)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.double()
    decoder.double()
    # Images within [0, 1], where nothing is clamped.
    decoder.decoder.conv_out.weight.data.mul_(0.2)
    decoder.decoder.conv_out.bias.data.zero_()
    return parameters


def test_the_gradient_of_the_lora_equals_central_differences_in_float64(
    case: Case, fresh: Model
) -> None:
    model = fresh
    model.embeds = {
        prompt: Embeds({name: tensor.double() for name, tensor in embeds.tensors.items()})
        for prompt, embeds in model.embeds.items()
    }
    parameters = in_float64(model)
    assert len(parameters) == 2 * case.layers
    start = noise(model, case.sizes[0], 2).double()
    conditioning = model.conditioning(PROMPTS[:2], "")
    denoise = guided(model.network.predict, conditioning, two_branches(model, 3.0))
    schedule = model.network.schedule(3, tuple(start.shape[1:]))
    weight = randn(7, 2, 3, *case.sizes[0])

    def loss() -> Tensor:
        path = last_k(3).path((0, 1, 2))
        images = model.decoder.decode(sample(denoise, start, schedule, path=path))
        low, high = images.detach().min(), images.detach().max()
        assert 0.0 < float(low) < float(high) < 1.0
        return (images * weight).sum()

    directions = [randn(20 + i, *p.shape) for i, p in enumerate(parameters)]

    def moved(size: float) -> float:
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.data.add_(size * direction)
        with torch.no_grad():
            value = float(loss())
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.data.sub_(size * direction)
        return value

    with KeepsFloat64():
        loss().backward()
        # Richardson's extrapolation of two steps: the error is of fourth order.
        wide, narrow = ((moved(h) - moved(-h)) / (2.0 * h) for h in (2e-4, 1e-4))
    expected = (4.0 * narrow - wide) / 3.0
    # A layer without a part in the result has no gradient: the text's query in the last block.
    slopes = [
        (p.grad * d).sum()
        for p, d in zip(parameters, directions, strict=True)
        if p.grad is not None
    ]
    assert abs(expected) > 1e-2
    assert float(torch.stack(slopes).sum()) == pytest.approx(expected, rel=1e-6)


def test_recomputed_blocks_give_the_same_gradients(case: Case, fresh: Model) -> None:
    model = fresh
    targets = model.family.target_modules
    parameters = lora.inject(model.network.module, rank=2, alpha=2, target_modules=targets, seed=0)
    fill_lora_b(model.network.module, seed=1)
    start = noise(model, case.sizes[0])
    conditioning = model.conditioning(PROMPTS, "")
    denoise = guided(model.network.predict, conditioning, two_branches(model, 3.0))
    step = model.network.schedule(5, tuple(start.shape[1:])).steps[2]

    def gradients(on: bool, has_grad: bool) -> list[Tensor]:
        model.network.recompute_blocks(on)
        latents = start.clone().requires_grad_(has_grad)
        for tensor in parameters:
            tensor.grad = None
        denoise(latents, step).square().sum().backward()
        model.network.recompute_blocks(False)
        return [tensor.grad for tensor in (*parameters, latents) if tensor.grad is not None]

    for has_grad in (False, True):
        plain, again = gradients(False, has_grad), gradients(True, has_grad)
        assert len(plain) == len(again)
        for a, b in zip(plain, again, strict=True):
            assert float((a - b).norm()) <= 1e-5 * float(a.norm()) + 1e-12
        assert max(float(gradient.norm()) for gradient in plain) > 1e-3


def test_saturated_pixels_have_the_gradient_that_leads_back(case: Case, fresh: Model) -> None:
    model, decoder = fresh, fresh.decoder
    # The last convolution made larger, so that most pixels leave the range.
    decoder.module.decoder.conv_out.weight.data.mul_(50.0)
    latents = noise(model, case.sizes[0]).requires_grad_()
    images = decoder.decode(latents)
    white = images.detach() == 1.0
    assert 0.1 < float(white.float().mean()) < 0.9
    # Loss: less light in the white pixels alone, and more of it. The first leads back.
    (back,) = torch.autograd.grad((images * white).sum(), [latents], retain_graph=True)
    (outward,) = torch.autograd.grad(-(images * white).sum(), [latents])
    assert float(back.norm()) > 1e-2
    assert float(outward.norm()) == 0.0


# --- Shapes without weights ---


@pytest.mark.parametrize(
    ("name", "parameters", "buffers", "shape"),
    [
        ("stabilityai/stable-diffusion-3-medium-diffusers", 2.028, 0.057, (16, 64, 64)),
        ("stabilityai/stable-diffusion-3.5-medium", 2.243, 0.226, (16, 64, 64)),
        ("stabilityai/stable-diffusion-3.5-large", 8.057, 0.090, (16, 64, 64)),
        ("black-forest-labs/FLUX.1-dev", 11.901, 0.0, (16, 64, 64)),
        ("black-forest-labs/FLUX.1-Krea-dev", 11.901, 0.0, (16, 64, 64)),
        ("black-forest-labs/FLUX.1-schnell", 11.891, 0.0, (16, 64, 64)),
        ("black-forest-labs/FLUX.2-klein-4B", 3.876, 0.0, (128, 32, 32)),
        ("black-forest-labs/FLUX.2-klein-base-4B", 3.876, 0.0, (128, 32, 32)),
        ("black-forest-labs/FLUX.2-klein-9B", 9.079, 0.0, (128, 32, 32)),
        ("black-forest-labs/FLUX.2-klein-base-9B", 9.079, 0.0, (128, 32, 32)),
        ("Tongyi-MAI/Z-Image-Turbo", 6.155, 0.0, (16, 64, 64)),
        ("Tongyi-MAI/Z-Image", 6.155, 0.0, (16, 64, 64)),
        ("Qwen/Qwen-Image", 20.430, 0.0, (16, 64, 64)),
        ("krea/Krea-2-Raw", 12.82, 0.0, (16, 64, 64)),
        ("krea/Krea-2-Turbo", 12.82, 0.0, (16, 64, 64)),
    ],
)
def test_published_architectures_have_their_known_sizes(
    name: str, parameters: float, buffers: float, shape: tuple[int, int, int]
) -> None:
    """Billions of numbers of the published checkpoints, counted without them."""
    made = meta_model(ModelConfig(id=name), torch.bfloat16)
    network = made.parts.network
    found = [
        sum(t.numel() for t in tensors) / 1e9
        for tensors in (network.module.parameters(), network.module.buffers())
    ]
    assert found == pytest.approx([parameters, buffers], abs=0.0006)
    assert network.latent_shape(512, 512) == shape
    assert made.image_size(shape) == (512, 512)
    assert made.image_size(network.latent_shape(None, None)) == (1024, 1024)
    distilled = ("klein" in name and "base" not in name) or name == "krea/Krea-2-Turbo"
    assert find(ModelConfig(id=name))[0].guides is not distilled


def test_on_meta_the_network_is_the_loaded_one_without_its_numbers(
    case: Case, model: Model, folder: Path
) -> None:
    made = meta_model(ModelConfig(id=str(folder)), torch.float32)
    pairs = (made.parts.network, model.network), (made.parts.decoder, model.decoder)
    for empty, loaded in pairs:
        shapes = [
            {n: (t.shape, t.dtype) for n, t in part.module.state_dict().items()}
            for part in (empty, loaded)
        ]
        assert shapes[0] == shapes[1]
    shape = model.network.latent_shape(*case.sizes[1])
    assert made.parts.network.schedule(7, shape) == model.network.schedule(7, shape)
    if case is SD3:  # its tokenizers, which only a loaded model has, cut at 16 of 77 positions
        return
    text = model.conditioning(["x"], None).text.tensors
    assert {n: t.shape for n, t in made.conditioning.text.tensors.items()} == {
        n: t.shape for n, t in text.items()
    }


def test_the_share_of_the_path_that_the_last_calls_cover() -> None:
    """The figures of diffusers' schedulers, from their definitions."""
    network: Any = meta_model(
        ModelConfig(id="stabilityai/stable-diffusion-3.5-medium"), torch.float32
    ).parts.network
    shape = network.latent_shape(512, 512)

    def last(schedule: NoiseSchedule, k: int) -> float:
        return schedule.path_share(range(len(schedule) - k, len(schedule)))

    # Shift s: u -> s u / (1 + (s - 1) u). The scheduler's own list runs from 1 to the shifted
    # 0.001, and is shifted once more.
    def shift(u: float) -> float:
        return 3.0 * u / (1.0 + 2.0 * u)

    assert last(network.schedule(28, shape), 1) == pytest.approx(shift(shift(0.001)), rel=1e-5)
    assert last(network.schedule(28, shape, "linear"), 1) == pytest.approx(shift(1 / 28), rel=1e-5)
    assert last(network.schedule(28, shape, "linear"), 28) == pytest.approx(1.0)
    klein: Any = meta_model(
        ModelConfig(id="black-forest-labs/FLUX.2-klein-4B"), torch.float32
    ).parts.network
    assert last(klein.schedule(4, klein.latent_shape(512, 512)), 1) == pytest.approx(
        0.717, abs=5e-4
    )
    turbo: Any = meta_model(
        ModelConfig(id="Tongyi-MAI/Z-Image-Turbo"), torch.bfloat16
    ).parts.network
    shares = [last(turbo.schedule(8, turbo.latent_shape(512, 512)), k) for k in (1, 2, 3)]
    assert shares == pytest.approx([shift(k / 8) for k in (1, 2, 3)])  # .3, .5, .643


# --- What is wrong with a model ---


def changed(folder: Path, place: Path, file: str, **values: Any) -> Path:
    """Return a copy of a model with other values in one of its JSON files."""
    copy = Path(shutil.copytree(folder, place))
    found = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(found | values))
    return copy


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("sd3", "text_encoder_2"),
        ("sd3", "text_encoder_3"),
        ("sd3", "tokenizer_3"),
        ("sd3", "transformer"),
        ("sd3", "vae"),
        ("klein", "text_encoder"),
        ("klein", "tokenizer"),
        ("zimage", "text_encoder"),
        ("zimage", "tokenizer"),
        ("zimage", "transformer"),
        ("zimage", "vae"),
        ("zimage", "scheduler"),
        *(
            ("krea2", part)
            for part in ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")
        ),
        ("flux1", "text_encoder"),
        ("flux1", "text_encoder_2"),
        ("flux1", "transformer"),
        ("qwen", "text_encoder"),
        ("qwen", "tokenizer"),
        ("qwen", "transformer"),
        ("qwen", "vae"),
    ],
)
def test_a_missing_part_is_named(
    family: str, part: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    copy = Path(shutil.copytree(request.getfixturevalue(family), tmp_path / "copy"))
    shutil.rmtree(copy / part)
    with pytest.raises(AssetError, match=f"it has no folder {part}$") as caught:
        load(copy)
    if part == "text_encoder_3":
        assert "model.t5: none" in (caught.value.hint or "")


@pytest.mark.parametrize("family", sorted(CASES))
def test_half_a_download_is_reported(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    copy = Path(shutil.copytree(request.getfixturevalue(family), tmp_path / "copy"))
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AssetError, match=r"model\.id: cannot load .*transformer"):
        load(copy, ())
    file.unlink()
    with pytest.raises(AssetError, match=r"model\.id: cannot load .*transformer"):
        load(copy, ())


@pytest.mark.parametrize(
    ("family", "file", "values", "message"),
    [
        (
            "sd3",
            "model_index.json",
            {"_class_name": "StableDiffusion3InpaintPipeline"},
            "supported",
        ),
        (
            "sd3",
            "model_index.json",
            {"_class_name": "StableDiffusion3ControlNetPipeline"},
            "StableDiffusion3Pipeline (Stable Diffusion 3 and 3.5)",
        ),
        ("klein", "model_index.json", {"_class_name": "Flux2Pipeline"}, "is a Flux2Pipeline"),
        (
            "sd3",
            "model_index.json",
            {"scheduler": ["diffusers", "FlowMatchHeunDiscreteScheduler"]},
            "scheduler: FlowMatchHeunDiscreteScheduler is not supported",
        ),
        (
            "sd3",
            "scheduler/scheduler_config.json",
            {"stochastic_sampling": True},
            "stochastic_sampling: expected False, or null, got True",
        ),
        ("sd3", "scheduler/scheduler_config.json", {"shift": "three"}, "shift: expected a number"),
        ("sd3", "vae/config.json", {"shift_factor": None}, "shift_factor: expected a number"),
        ("sd3", "vae/config.json", {"latents_mean": [0.0]}, "latents_mean: expected null"),
        (
            "klein",
            "transformer/config.json",
            {"guidance_embeds": True},
            "guidance_embeds: expected",
        ),
        ("klein", "transformer/config.json", {"patch_size": 2}, "patch_size: expected 1, got 2"),
        (
            "klein",
            "model_index.json",
            {"text_encoder": ["transformers", "Mistral3ForConditionalGeneration"]},
            "text_encoder: Mistral3ForConditionalGeneration is not supported",
        ),
        *(
            ("zimage", "model_index.json", {"_class_name": f"ZImage{kind}"}, f"is a ZImage{kind};")
            for kind in ("OmniPipeline", "Img2ImgPipeline", "InpaintPipeline", "ControlNetPipeline")
        ),
        (
            "zimage",
            "transformer/config.json",
            {"siglip_feat_dim": 1152},
            "siglip_feat_dim: expected null, got 1152",
        ),
        ("zimage", "transformer/config.json", {"all_patch_size": [4]}, "all_patch_size: expected"),
        ("zimage", "transformer/config.json", {"axes_lens": [600, 64]}, "three whole numbers"),
        (
            "zimage",
            "transformer/config.json",
            {"axes_lens": [513, 64, 64]},
            "axes_lens: expected at least 514 positions for texts, got 513",
        ),
        ("zimage", "vae/config.json", {"shift_factor": None}, "shift_factor: expected a number"),
        (
            "zimage",
            "model_index.json",
            {"text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"]},
            "text_encoder: Qwen2_5_VLForConditionalGeneration is not supported",
        ),
        (
            "zimage",
            "scheduler/scheduler_config.json",
            {"_class_name": "UniPCMultistepScheduler"},
            "_class_name: expected FlowMatchEulerDiscreteScheduler, got UniPC",
        ),
        (
            "krea2",
            "model_index.json",
            {"_class_name": "Krea2EditPipeline"},
            "is a Krea2EditPipeline;",
        ),
        ("krea2", "model_index.json", {"patch_size": 4}, "patch_size: expected 2, got 4"),
        (
            "krea2",
            "model_index.json",
            {"is_distilled": "yes"},
            "is_distilled: expected True or False",
        ),
        (
            "krea2",
            "model_index.json",
            {"text_encoder_select_layers": [1, 3]},
            "text_encoder_select_layers: expected 3 numbers of at most 6, got [1, 3]",
        ),
        (
            "krea2",
            "model_index.json",
            {"text_encoder_select_layers": [1, 3, 7]},
            "text_encoder_select_layers: expected 3 numbers of at most 6, got [1, 3, 7]",
        ),
        (
            "krea2",
            "model_index.json",
            {"text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"]},
            "text_encoder: Qwen2_5_VLForConditionalGeneration is not supported",
        ),
        (
            "krea2",
            "transformer/config.json",
            {"axes_dims_rope": [8, 8]},
            "axes_dims_rope: expected three whole numbers",
        ),
        (
            "krea2",
            "text_encoder/config.json",
            {"text_config": None},
            "text_config: expected an object",
        ),
        ("krea2", "vae/config.json", {"input_channels": 4}, "input_channels: expected 3, got 4"),
        *(
            ("flux1", "model_index.json", {"_class_name": name}, f"is a {name}; supported: ")
            for name in ("FluxFillPipeline", "FluxControlPipeline", "FluxKontextPipeline")
        ),
        ("flux1", "transformer/config.json", {"patch_size": 2}, "patch_size: expected 1, got 2"),
        (
            "flux1",
            "scheduler/scheduler_config.json",
            {"base_shift": "half"},
            "base_shift: expected a number",
        ),
        ("flux1", "vae/config.json", {"shift_factor": None}, "shift_factor: expected a number"),
        *(
            ("qwen", "model_index.json", {"_class_name": f"QwenImage{kind}"}, f"QwenImage{kind};")
            for kind in (
                *("EditPipeline", "EditPlusPipeline", "Img2ImgPipeline", "InpaintPipeline"),
                *("ControlNetPipeline", "LayeredPipeline", "21Pipeline"),
            )
        ),
        *(
            ("qwen", "transformer/config.json", {key: True}, f"{key}: expected False, got True")
            for key in (
                *("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"),
            )
        ),
        ("qwen", "transformer/config.json", {"patch_size": 1}, "patch_size: expected 2, got 1"),
        *(
            ("qwen", "transformer/config.json", {"axes_dims_rope": axes}, "three even numbers")
            for axes in ([4, 6, 8], [8, 8], [3, 5, 8])
        ),
        ("qwen", "vae/config.json", {"z_dim": 8}, "latents_mean: expected 8 values"),
        ("qwen", "vae/config.json", {"input_channels": 4}, "input_channels: expected 3, got 4"),
        (
            "qwen",
            "model_index.json",
            {"vae": ["diffusers", "AutoencoderKLWan"]},
            "vae: AutoencoderKLWan is not supported",
        ),
        (
            "qwen",
            "model_index.json",
            {"text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"]},
            "text_encoder: Qwen3VLForConditionalGeneration is not supported",
        ),
    ],
)
def test_what_is_not_supported_is_refused_alike_for_a_run_and_its_plan(
    family: str,
    file: str,
    values: dict[str, Any],
    message: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    copy = changed(request.getfixturevalue(family), tmp_path / "copy", file, **values)
    for refused in (
        lambda: load(copy),
        lambda: meta_model(ModelConfig(id=str(copy)), torch.float32),
    ):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert message in caught.value.message


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (small_sd3, {"in_channels": 17}),
        (small_klein, {"in_channels": 20}),
        (small_zimage, {"in_channels": 17}),
        (small_krea2, {"in_channels": 20}),
        # As FLUX.1-Fill and FLUX.1-Canny are.
        (small_flux1, {"in_channels": 96, "out_channels": 32}),
        # As the network of the inpainting ControlNet reads them.
        (small_qwen_image, {"in_channels": 36}),
    ],
)
def test_a_network_that_takes_more_than_latents_is_refused(
    build: Callable[..., Path], options: dict[str, int], tmp_path: Path
) -> None:
    path = build(tmp_path / "model", **options)
    for refused in (
        lambda: load(path, ()),
        lambda: meta_model(ModelConfig(id=str(path)), torch.float32),
    ):
        with pytest.raises(ConfigError, match="inpainting models cannot be trained"):
            refused()


def test_text_encoders_of_another_model_are_refused(
    sd3: Path, klein: Path, zimage: Path, qwen: Path, krea2: Path, tmp_path: Path
) -> None:
    file = "transformer/config.json"
    copy = changed(sd3, tmp_path / "sd3", file, pooled_projection_dim=24)
    with pytest.raises(ConfigError, match=r"pooled_projection_dim: .* of width 24, .* have 20"):
        load(copy)
    copy = changed(klein, tmp_path / "klein", file, joint_attention_dim=30)
    with pytest.raises(ConfigError, match=r"joint_attention_dim: .* of width 30, .* have 24"):
        load(copy)
    copy = changed(zimage, tmp_path / "zimage", file, cap_feat_dim=30)
    with pytest.raises(ConfigError, match=r"cap_feat_dim: .* of width 30, .* have 24"):
        load(copy)
    copy = changed(qwen, tmp_path / "qwen", file, joint_attention_dim=30)
    with pytest.raises(ConfigError, match=r"joint_attention_dim: .* of width 30, .* have 24"):
        load(copy)
    copy = changed(krea2, tmp_path / "krea2", file, text_hidden_dim=30)
    with pytest.raises(ConfigError, match=r"text_hidden_dim: .* of width 30, .* have 24"):
        load(copy)


def test_flux1_cannot_do_without_t5_nor_with_the_text_encoders_of_another_model(
    flux1: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"model\.t5: none: FLUX\.1 cannot do without T5"):
        load(flux1, t5="none")
    copy = changed(flux1, tmp_path / "copy", "transformer/config.json", pooled_projection_dim=30)
    with pytest.raises(ConfigError, match=r"pooled_projection_dim: .* of width 30, .* have 16"):
        load(copy)
    # A shift that is linear between the same two numbers of tokens.
    copy = changed(
        flux1, tmp_path / "shift", "scheduler/scheduler_config.json", base_image_seq_len=40
    )
    with pytest.raises(ConfigError, match=r"scheduler: float division by zero"):
        load(copy, ()).network.schedule(4, (8, 8, 8))


def test_a_variant_that_no_part_has_is_refused(zimage: Path) -> None:
    config = ModelConfig(id=str(zimage), dtype="float32", variant="fp61")
    with pytest.raises(ConfigError, match=r"model\.variant: no part of .* the variant fp61"):
        open_model(config, (), CPU)


class Static(FlowTransformer):
    """A network of a scheduler without a dynamic shift."""

    def shift(self, steps: int, latent_shape: tuple[int, int, int]) -> None:
        """Return None; see `FlowTransformer`."""


def static(**options: Any) -> NoiseSchedule:
    sizes = Sizes(channels=8, per_latent=8, unit=16, default=64)
    return Static(None, options, sizes, "m").schedule(4, (8, 8, 8))


def test_a_shift_whose_first_level_is_rounded_above_1_is_sampled() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.32)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4))
    wanted = scheduler.sigmas.tolist()
    assert wanted[0] > 1.0
    found = [step.sigma for step in static(shift=1.32).steps]
    assert found == [1.0, *wanted[1:-1]]


def test_a_scheduler_of_two_kinds_of_levels_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.id: m: scheduler: Only one of .*karras"):
        static(use_karras_sigmas=True, use_beta_sigmas=True)


def test_a_model_that_exists_as_a_modular_pipeline_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "modular_model_index.json").write_text('{"_class_name": "Flux3ModularPipeline"}')
    with pytest.raises(
        ConfigError, match=r"is a ModularPipeline .*supported: .*Flux2KleinPipeline"
    ):
        load(tmp_path)


def test_sizes_that_the_network_cannot_sample_name_the_nearest(
    sd3: Path, klein: Path, flux1: Path, zimage: Path, qwen: Path, krea2: Path
) -> None:
    shape_of = load(sd3, ()).network.latent_shape
    with pytest.raises(ConfigError, match=r"sample\.width: 18 is not a multiple of 4.*nearest: 16"):
        shape_of(16, 18)
    # Its position embeddings end there.
    assert shape_of(32, 32) == (8, 16, 16)
    with pytest.raises(ConfigError, match=r"sample\.height: 36 is more than the 32 that"):
        shape_of(36, 16)
    shape_of = load(klein, ()).network.latent_shape
    with pytest.raises(ConfigError, match=r"sample\.height: 30 is not a multiple of 4"):
        shape_of(30, 32)
    assert shape_of(None, 16) == (16, 64, 4)
    shape_of = load(zimage, ()).network.latent_shape
    with pytest.raises(ConfigError, match=r"sample\.width: 40 is not a multiple.*nearest: 32"):
        shape_of(64, 40)
    assert shape_of(1024, 16) == (8, 128, 2)
    with pytest.raises(ConfigError, match=r"sample\.height: 1040 is more than the 1024 that"):
        shape_of(1040, 16)
    for folder in (flux1, qwen):
        shape_of = load(folder, ()).network.latent_shape
        with pytest.raises(ConfigError, match=r"sample\.width: 18 is not a multiple of 4"):
            shape_of(16, 18)
    # 4096 positions, of which texts take up to 512 behind half of the longer side.
    most = 2 * (4096 - 512) * 4
    assert shape_of(most, 4) == (4, most // 2, 2)
    with pytest.raises(ConfigError, match=rf"sample\.height: {most + 4} is more than the {most} "):
        shape_of(most + 4, 4)
    shape_of = load(krea2, ()).network.latent_shape
    with pytest.raises(ConfigError, match=r"sample\.width: 40 is not a multiple of 16.*: 32"):
        shape_of(64, 40)
    assert shape_of(None, 1040) == (4, 128, 130)


def test_linear_spacing_is_refused_for_a_diffusion_model(tmp_path: Path) -> None:
    family, _ = find(ModelConfig(id=str(small_pipeline(tmp_path / "sd"))))
    with pytest.raises(ConfigError, match=r"sample\.spacing: .*Stable Diffusion 1.x and 2.x"):
        sampler(SampleConfig(spacing="linear"), family)


def test_the_published_flows_are_those_whose_index_names_a_flow() -> None:
    flows = {
        *("StableDiffusion3Pipeline", "FluxPipeline", "Flux2KleinPipeline"),
        *("ZImagePipeline", "QwenImagePipeline", "Krea2Pipeline"),
    }
    named = {name for name in PUBLISHED if find(ModelConfig(id=name))[0].pipeline_class in flows}
    assert len(named) == 15
