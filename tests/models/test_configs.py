"""What the files of a model folder say is obeyed, as plain diffusers does, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignprop_cli.cli import main
from alignprop_cli.config.schema import ModelConfig, SampleConfig
from alignprop_cli.errors import AlignPropError, AssetError, ConfigError
from alignprop_cli.guidance import guided
from alignprop_cli.models import configs, sdxl
from alignprop_cli.models.base import Model
from alignprop_cli.models.families import ARCHITECTURES, TINY, open_model, sampler
from alignprop_cli.models.meta import meta_model
from alignprop_cli.models.schedulers import noise_schedule
from alignprop_cli.sampling import sample
from tests.factories import SD1_BETAS, randn, small_pipeline

CPU = torch.device("cpu")
PROMPTS = ["a cat", "dogs"]
# Whole chains in float32, batched differently.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pipeline(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def load(path: Path) -> Model:
    return open_model(ModelConfig(id=str(path), dtype="float32"), [*PROMPTS, ""], CPU)


def plan(path: Path) -> Any:
    """Look at the model as a dry run does."""
    return meta_model(ModelConfig(id=str(path)), torch.float32)


def edit(folder: Path, file: str, *removed: str, **values: Any) -> Path:
    """Change a JSON file of a model, and return it."""
    path = folder / file
    found = {k: v for k, v in json.loads(path.read_text()).items() if k not in removed}
    path.write_text(json.dumps(found | values))
    return path


def refused(path: Path) -> AlignPropError:
    """Return the error of a real run, which must be that of a dry run."""
    with pytest.raises(AlignPropError) as real:
        load(path)
    with pytest.raises(AlignPropError) as dry:
        plan(path)
    assert dry.value.message == real.value.message
    assert "\n" not in real.value.message
    return real.value


# --- Schedulers ---

SCHEDULER = "scheduler/scheduler_config.json"
INDEX = "model_index.json"


@pytest.mark.parametrize(
    "kind",
    [
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
        "TCDScheduler",
        "CosineDPMSolverMultistepScheduler",
        "NoSuchScheduler",
    ],
)
@pytest.mark.parametrize("where", [INDEX, SCHEDULER, "both"])
def test_a_scheduler_that_is_no_way_through_betas_is_refused(
    copy: Path, kind: str, where: str
) -> None:
    if where != INDEX:
        edit(copy, SCHEDULER, _class_name=kind)
    if where != SCHEDULER:
        edit(copy, INDEX, scheduler=["diffusers", kind])
    error = refused(copy)
    assert type(error) is ConfigError
    assert f"{kind} is not supported" in error.message
    assert str(copy / (SCHEDULER if where == SCHEDULER else INDEX)) in error.message


def plain(folder: Path, steps: int = 3, **options: Any) -> Tensor:
    """Return pictures of plain diffusers with DDIM in place of the model's scheduler."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    # Latents are never clipped: the pipeline switches that off for its own scheduler.
    own = pipeline.scheduler.config
    pipeline.scheduler = DDIMScheduler.from_config(own, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        num_inference_steps=steps,
        latents=randn(3, 2, 4, 8, 8, dtype=torch.float32),
        output_type="pt",
        **{"guidance_scale": 4.0} | options,
    ).images


def ours(folder: Path) -> Tensor:
    return drawn(load(folder))


@torch.no_grad()
def drawn(model: Model, steps: int = 3, guidance_scale: float = 4.0) -> Tensor:
    made = sampler(SampleConfig(guidance_scale=guidance_scale), model.family)
    denoise = guided(model.network.predict, model.conditioning(PROMPTS, ""), made.guidance)
    schedule = model.network.schedule(steps, (4, 8, 8))
    latents = randn(3, 2, 4, 8, 8, dtype=torch.float32)
    return model.decoder.decode(sample(denoise, latents, schedule))


# What diffusers' schedulers have among their settings, with values that differ from the defaults.
OBEYED: dict[str, dict[str, Any]] = {
    "betas": {"beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "own betas": {
        "num_train_timesteps": 40,
        "trained_betas": [0.01 + 0.001 * i for i in range(40)],
    },
    "timesteps": {"num_train_timesteps": 500},
    "v": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "zero snr": {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    },
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "alpha one": {"set_alpha_to_one": True},
    "offset 0": {"steps_offset": 0},
    "clipping": {"clip_sample": True, "clip_sample_range": 0.5},
    "thresholds that are off": {"dynamic_thresholding_ratio": 0.5, "sample_max_value": 0.1},
}


@pytest.mark.parametrize("case", OBEYED)
def test_a_setting_of_the_scheduler_is_obeyed_as_by_plain_diffusers(copy: Path, case: str) -> None:
    edit(copy, SCHEDULER, **OBEYED[case])
    torch.testing.assert_close(ours(copy), plain(copy), **CLOSE)
    plan(copy)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
        ("UniPCMultistepScheduler", {"prediction_type": "v_prediction"}),
        ("DDPMScheduler", {"variance_type": "fixed_small", "timestep_spacing": "trailing"}),
    ],
)
def test_other_ways_through_the_same_noise_are_replaced_by_ddim(
    copy: Path, kind: str, settings: dict[str, Any]
) -> None:
    betas = getattr(diffusers, kind)(**SD1_BETAS | settings).config
    (copy / SCHEDULER).write_text(json.dumps(dict(betas) | {"_class_name": kind}))
    edit(copy, INDEX, scheduler=["diffusers", kind])
    torch.testing.assert_close(ours(copy), plain(copy), **CLOSE)
    # The plan has the same noise levels as the run.
    assert plan(copy).parts.network.schedule(5, (4, 8, 8)) == load(copy).network.schedule(
        5, (4, 8, 8)
    )


# --- What is not obeyed, by file and key ---

UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
WORDS = "tokenizer/tokenizer_config.json"

NOT_OBEYED = [
    (SCHEDULER, "thresholding", True, "dynamic thresholding"),
    (SCHEDULER, "use_flow_sigmas", True, "a rectified flow"),
    (SCHEDULER, "timestep_type", "continuous", "expected discrete"),
    (SCHEDULER, "prediction_type", "flow_prediction", "expected epsilon or v_prediction"),
    (SCHEDULER, "timestep_spacing", "odd", "expected leading or trailing or linspace, got odd"),
    (SCHEDULER, "timestep_spacing", None, "got nothing"),
    (SCHEDULER, "final_sigmas_type", "sigma_max", "expected zero or sigma_min, got sigma_max"),
    (SCHEDULER, "interpolation_type", "log_linear", "expected linear, got log_linear"),
    (SCHEDULER, "sigma_min", 0.0, "a number between 0 and inf, or null, got 0.0"),
    (SCHEDULER, "beta_schedule", "sigmoid", "expected linear or scaled_linear"),
    (SCHEDULER, "beta_start", "x", "a number between 0 and 1, got x"),
    (SCHEDULER, "beta_end", 5.0, "a number between 0 and 1, got 5.0"),
    (SCHEDULER, "num_train_timesteps", 10**9, "a whole number from 1 to 100000"),
    (SCHEDULER, "num_train_timesteps", 0, "a whole number from 1"),
    (SCHEDULER, "num_train_timesteps", True, "a whole number"),
    (SCHEDULER, "trained_betas", [0.1, 0.2], "expected 1000 numbers, got 2 of them"),
    (SCHEDULER, "trained_betas", ["x"], "a list, each a number"),
    (SCHEDULER, "steps_offset", -1, "a whole number from 0"),
    (SCHEDULER, "rescale_betas_zero_snr", "yes", "expected True or False"),
    (UNET, "time_cond_proj_dim", 1, "a whole number from 2"),
    (SCHEDULER, "original_inference_steps", 0, "a whole number from 1"),
    (SCHEDULER, "timestep_scaling", -1.0, "a number between 0"),
    (UNET, "class_embed_type", "timestep", "a class embedding"),
    (UNET, "num_class_embeds", 10, "a class embedding"),
    (UNET, "addition_embed_type", "text_time", "an additional embedding"),
    (UNET, "encoder_hid_dim_type", "image_proj", "expected text_proj, or null"),
    (UNET, "_class_name", "UNet2DModel", "UNet2DModel is not supported"),
    (UNET, "in_channels", "4", "a whole number from 1"),
    (UNET, "block_out_channels", [], "a list, each a whole number"),
    (UNET, "sample_size", [8, 0], "a whole number from 1"),
    (UNET, "cross_attention_dim", 64, "embeddings of width 64, the text encoder's have 32"),
    (VAE, "_class_name", "AsymmetricAutoencoderKL", "is not supported"),
    (VAE, "shift_factor", 0.1, "a shift of the latents"),
    (VAE, "latents_mean", [1.0], "a mean of the latents"),
    (VAE, "latents_std", [2.0], "a deviation of the latents"),
    (VAE, "scaling_factor", 0, "a number between 0"),
    (TEXT, "use_attention_mask", True, "an attention mask of the prompt"),
    (TEXT, "vocab_size", 5, "vocab_size: 5 is less than the"),
    (TEXT, "hidden_size", "wide", "a whole number"),
    (WORDS, "model_max_length", 10**30, "a whole number"),
    (WORDS, "model_max_length", 17, "at most 16, the max_position_embeddings"),
    (INDEX, "text_encoder", ["transformers", "T5EncoderModel"], "T5EncoderModel is not supported"),
    (INDEX, "text_encoder", ["os", "system"], "system is not supported"),
    (INDEX, "tokenizer", ["transformers", "T5Tokenizer"], "T5Tokenizer is not supported"),
]


@pytest.mark.parametrize(
    ("file", "key", "value", "words"),
    NOT_OBEYED,
    ids=[f"{n}-{r[1]}" for n, r in enumerate(NOT_OBEYED)],
)
def test_what_is_not_obeyed_is_refused_with_its_file_and_key(
    copy: Path, file: str, key: str, value: Any, words: str
) -> None:
    path = edit(copy, file, **{key: value})
    error = refused(copy)
    assert type(error) is ConfigError
    assert error.message.startswith(f"model.id: {path}: {key}: ")
    assert words in error.message


@pytest.mark.parametrize("kind", ["use_karras_sigmas", "use_exponential_sigmas"])
@pytest.mark.parametrize("ends", [{"sigma_min": 10.0, "sigma_max": 0.1}, {"sigma_min": 20.0}])
def test_levels_that_rise_are_refused_where_their_ends_are_used(
    kind: str, ends: dict[str, float]
) -> None:
    """The largest level of these betas is 14.6: sigma_min = 20 alone is above it."""
    own = EulerDiscreteScheduler(**SD1_BETAS, **{kind: True}, **ends)
    config = {**own.config, "_class_name": "EulerDiscreteScheduler"}
    for steps in (5, 1000):
        with pytest.raises(ConfigError, match=r"model\.id: m: the noise levels rise .* sigma_min"):
            noise_schedule(config, steps, "m")
    # Without them nothing reads the ends.
    assert noise_schedule({**config, kind: False}, 5, "m").steps[0].sigma > 0.99


def test_a_tokenizer_without_its_length_is_refused(copy: Path) -> None:
    path = edit(copy, WORDS, "model_max_length")
    message = f"model.id: {path}: model_max_length: expected a whole number from 1 to 65536"
    assert refused(copy).message == f"{message}, got nothing"


def test_a_projection_of_the_texts_is_drawn_as_by_plain_diffusers(tmp_path: Path) -> None:
    folder = small_pipeline(tmp_path, encoder_hid_dim=32, encoder_hid_dim_type="text_proj")
    torch.testing.assert_close(ours(folder), plain(folder), **CLOSE)
    plan(folder)
    path = edit(folder, UNET, encoder_hid_dim=48)
    assert str(path) in refused(folder).message


def test_a_network_that_predicts_a_variance_too_is_refused(tmp_path: Path) -> None:
    folder = small_pipeline(tmp_path, out_channels=8)
    assert "gives 8 channels for 4: a learned variance" in refused(folder).message


def test_what_does_not_change_images_is_passed_over(copy: Path) -> None:
    expected = ours(copy)
    edit(
        copy,
        INDEX,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    edit(copy, VAE, force_upcast=False)
    assert torch.equal(ours(copy), expected)
    plan(copy)


WITH_UNET = sorted(file.parent.parent for file in ARCHITECTURES.glob("sd-[12]*/unet/config.json"))


@pytest.mark.parametrize("place", [TINY, *WITH_UNET], ids=lambda p: p.name)
def test_what_is_shipped_is_obeyed(place: Path) -> None:
    kind = json.loads((place / INDEX).read_text())["_class_name"]
    is_xl = kind == "StableDiffusionXLPipeline"
    configs.check(place, sdxl.LAYOUT if is_xl else configs.STABLE_DIFFUSION)


# --- Guidance, by the values of diffusers ---


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_a_scale_of_at_most_one_is_the_text_branch_alone(folder: Path, scale: float) -> None:
    model = load(folder)
    found = drawn(model, guidance_scale=scale)
    torch.testing.assert_close(found, plain(folder, guidance_scale=scale), **CLOSE)
    assert torch.equal(found, drawn(model, guidance_scale=1.0))
    assert not torch.allclose(found, drawn(model, guidance_scale=1.5), **CLOSE)


# --- Damage ---


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop(path: Path) -> None:
    state = load_file(path)
    del state[max(state)]
    save_file(state, path, {"format": "pt"})


def add(path: Path) -> None:
    save_file(load_file(path) | {"zzz.weight": torch.ones(2)}, path, {"format": "pt"})


def reshape(path: Path) -> None:
    state = load_file(path)
    name = max(state)
    save_file(state | {name: torch.ones(3, 3)}, path, {"format": "pt"})


def empty(path: Path) -> None:
    path.write_bytes(b"")


WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.mark.parametrize("damage", [cut, drop, reshape, empty])
@pytest.mark.parametrize("part", WEIGHTS)
def test_damaged_weights_are_refused_and_never_filled_with_random_numbers(
    copy: Path, part: str, damage: Callable[[Path], None]
) -> None:
    damage(copy / part / WEIGHTS[part])
    with pytest.raises(AssetError) as raised:
        load(copy)
    assert raised.value.message.startswith(f"model.id: cannot load {copy / part}: ")
    assert "\n" not in raised.value.message


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_tensors_that_no_layer_uses_are_refused(copy: Path, part: str) -> None:
    add(copy / part / WEIGHTS[part])
    with pytest.raises(AssetError, match=r"has a tensor zzz\.weight"):
        load(copy)


DAMAGE = ["{", "[]", '"x"', "[" * 5000, '{"_class_name": {}}', "\xff", '{"a": "\\ud800"}']


@pytest.mark.parametrize(
    ("file", "text"),
    [
        *((file, "{") for file in (INDEX, SCHEDULER, UNET, VAE, TEXT, WORDS)),
        *((UNET, text) for text in DAMAGE),
    ],
)
def test_a_damaged_configuration_is_refused_by_name(copy: Path, file: str, text: str) -> None:
    (copy / file).write_bytes(text.encode("latin-1"))
    error = refused(copy)
    assert error.exit_code in (2, 3)
    assert (str(copy) if file == INDEX else str(copy / file)) in error.message


def test_a_configuration_that_is_no_file_or_too_large_is_refused(copy: Path) -> None:
    (copy / SCHEDULER).write_text(" " * 2**21)
    assert "has 2 MiB; at most 1 are read" in refused(copy).message
    (copy / SCHEDULER).unlink()
    (copy / SCHEDULER).mkdir()
    assert "is a folder, expected a file" in refused(copy).message


def test_the_command_says_it_with_exit_code_2(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = edit(copy, WORDS, "model_max_length")
    ask = ["train", "--preset", "tiny", "--model", str(copy), "--reward", "brightness"]
    for more in (["--dry-run"], ["-o", str(copy.parent / "run")]):
        with pytest.raises(SystemExit) as ended:
            main([*ask, *more])
        assert ended.value.code == 2
        err = " ".join(capsys.readouterr().err.split())
        assert f"{path}: model_max_length" in err


def test_the_scheduler_of_sd15_has_no_thousandth_step(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(
            [
                *("train", "--dry-run", "--model", "runwayml/stable-diffusion-v1-5"),
                *("--reward", "brightness", "--set", "sample.num_inference_steps=1000"),
            ]
        )
    assert ended.value.code == 2
    assert "1000 reaches timestep 1000" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_any_number_of_steps_works_or_is_refused(copy: Path, spacing: str) -> None:
    edit(copy, SCHEDULER, timestep_spacing=spacing, num_train_timesteps=60)
    network = load(copy).network
    refused_steps = [60, 61, 64] if spacing == "leading" else [61, 64]
    for steps in {*range(1, 61)} - {*refused_steps}:
        times = [step.timestep for step in network.schedule(steps, (4, 8, 8)).steps]
        assert len(times) == steps
        assert times == sorted(set(times), reverse=True)
        assert 0 <= times[-1] <= times[0] < 60
    for steps in refused_steps:
        with pytest.raises(ConfigError, match=r"sample\.num_inference_steps: \d+ "):
            network.schedule(steps, (4, 8, 8))


def test_a_step_that_rounding_adds_is_no_step() -> None:
    # diffusers has 62 timesteps for 61 steps of the embedded model, the last of which is -1.
    scheduler = DDIMScheduler.from_pretrained(TINY, subfolder="scheduler")
    scheduler.set_timesteps(61)
    assert scheduler.timesteps.tolist()[61:] == [-1]
    found = plan(TINY).parts.network.schedule(61, (12, 12, 12)).steps
    assert [step.timestep for step in found] == scheduler.timesteps.tolist()[:61]
