"""The three ways into the program for a LoRA file take the same files, and for the same LoRA.

`evaluate` draws with it, `soup` mixes it, `lora.init` trains it further. Each format is used as its
formula says, or refused by all three with the same message.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignprop_cli.cli import main
from alignprop_cli.config import presets
from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.console import Console
from alignprop_cli.lora import files
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.files import LORA_FILE, PEFT_CONFIG, PEFT_FILE
from alignprop_cli.models.base import Model
from alignprop_cli.models.families import TINY, TINY_FLOW, open_model
from alignprop_cli.training import setup
from tests.factories import randn
from tests.lora import written
from tests.lora.written import Lora, over_rank, over_root

QUICK = (
    *("--preset", "tiny", "--images", "1", "--reward", "brightness", "--quiet"),
    *("--set", "sample.num_inference_steps=1", "--set", "sample.guidance_scale=1"),
)

# Layers of the embedded network: rank and alpha.
ATTENTION = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (2, 3.0),
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0": (4, 1.0),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (4, 1.0),
}
LAYERS = ATTENTION | {
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj": (3, 0.5),
    "down_blocks.0.downsamplers.0.conv": (2, 2.0),
    "down_blocks.0.resnets.0.conv1": (4, 1.0),
    "mid_block.attentions.0.proj_in": (5, 2.5),
    "conv_in": (2, 1.0),
    "time_embedding.linear_1": (3, 6.0),
}


@pytest.fixture(scope="module")
def base() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(TINY, subfolder="unet").requires_grad_(False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs a command, and gives its exit code and messages."""

    def call(*args: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, args)))
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return int(ended.value.code or 0), err

    return call


# --- What each door uses ---


def used(network: torch.nn.Module) -> dict[str, Tensor]:
    """Return the weights of all layers with a LoRA, as the network computes with them."""
    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight.detach()
            found[name] = weight + layer.get_delta_weight(lora.ADAPTER).detach()
    return found


def evaluated(
    all_files: dict[str, Path], place: Path, *options: str
) -> dict[str, dict[str, Tensor]]:
    """Return the weights that `evaluate` draws the images of each LoRA with."""
    seen: list[dict[str, Tensor]] = []
    set_strength = lora.set_strength

    def spy(network: torch.nn.Module, strength: float) -> None:
        set_strength(network, strength)
        seen.append(used(network))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lora, "set_strength", spy)
        named = ["evaluate", *map(str, all_files.values()), *QUICK, *options]
        with pytest.raises(SystemExit) as ended:
            main([*named, "-o", str(place / "out")])
    assert not ended.value.code
    return dict(zip(all_files, seen, strict=True))


def mixed(run: Any, file: Path, place: Path, network: UNet2DConditionModel) -> dict:
    """Return the weights of a mix of one LoRA, computed from its file by its definition."""
    code, err = run("soup", file, "base", "--coef", "1", "-o", place / "soup", "--quiet")
    assert code == 0, err
    made = place / "soup" / LORA_FILE
    with safe_open(made, "pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    # alpha is the rank everywhere, so the factor is 1.
    assert settings["unet.r"] == settings["unet.lora_alpha"]
    assert settings["unet.rank_pattern"] == settings["unet.alpha_pattern"]
    state, found = load_file(made), {}
    for name in (n for n in state if n.endswith(".lora.down.weight")):
        layer = name.removeprefix("unet.").removesuffix(".lora.down.weight")
        weight = network.get_submodule(layer).weight
        up = state[name.replace(".down.", ".up.")].flatten(1)
        found[layer] = weight + (up @ state[name].flatten(1)).view(weight.shape)
    return found


def started(file: Path, preset: str = "tiny") -> dict[str, Tensor]:
    """Return the weights that training starts with from `lora.init`."""
    config = presets.resolve(preset=preset, assignments=[f"lora.init={file}"])
    setup.check(config, None)
    model = embedded(config.model.id)
    try:
        setup.prepare_lora(config, model, None, Console(quiet=True))
        return used(model.network.module)
    finally:
        lora.unload(model.network.module)


@functools.cache
def embedded(name: str = "tiny") -> Model:
    return open_model(ModelConfig(id=name), [], torch.device("cpu"))


def check(found: dict[str, Tensor], network: torch.nn.Module, deltas: dict) -> None:
    assert found.keys() == deltas.keys()
    for name, delta in deltas.items():
        expected = network.get_submodule(name).weight.double() + delta
        effect = float(delta.norm())
        assert effect > 0.0
        assert float((found[name].double() - expected).norm()) < 1e-4 * effect, name


# --- Formats ---


def one(alpha: float, rank: int) -> float:
    return 1.0


def peft_named(made: Lora, place: Path) -> Path:
    """PEFT's format, with the adapter's name in the names of the tensors."""
    state = made.state("lora_A.mine.weight", "lora_B.mine.weight", written.peft)
    save_file(state, place / PEFT_FILE)
    (place / PEFT_CONFIG).write_text(json.dumps(made.settings()), encoding="utf-8")
    return place


def with_text_encoder(made: Lora, place: Path) -> Path:
    """Diffusers' format with layers of the text encoder, which are left out."""
    state = made.state("lora.down.weight", "lora.up.weight", written.unet)
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer"
    state |= {f"{text}.down.weight": torch.ones(2, 96), f"{text}.up.weight": torch.ones(96, 2)}
    settings = {f"unet.{k}": v for k, v in made.settings().items()}
    settings |= {"text_encoder.r": 2, "text_encoder.lora_alpha": 9, "text_encoder.nosuch": 1}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    save_file(state, place / LORA_FILE, metadata=metadata)
    return place / LORA_FILE


def regular_patterns(made: Lora, place: Path) -> Path:
    """Diffusers' format with alphas by regular expressions."""
    patterns = {r"attn1\.to_q": 3.0, "ff.net.*proj": 0.5, "resnets.0.conv1|to_(k|out.0)": 1.0}
    patterns |= {"^conv_in": 1.0, "proj_in": 2.5, "linear_1": 6.0}
    return written.diffusers_ab(made, place, lora_alpha=2.0, alpha_pattern=patterns)


def kohya_half(made: Lora, place: Path) -> Path:
    """Kohya's format in half precision, whose numbers are those of the LoRA."""
    file = written.kohya_alpha(made, place)
    state = load_file(file)
    save_file({n: v if n.endswith(".alpha") else v.half() for n, v in state.items()}, file)
    return file


FORMATS = [
    (written.diffusers_down, LAYERS, over_rank),
    (written.diffusers_ab, LAYERS, over_rank),
    (written.diffusers_plain, LAYERS, one),
    (written.diffusers_alpha, LAYERS, over_rank),
    (written.diffusers_both, LAYERS, over_rank),
    (written.diffusers_rslora, LAYERS, over_root),
    (written.diffusers_name, LAYERS, one),
    (written.diffusers_processor, ATTENTION, one),
    (written.peft_folder, LAYERS, over_rank),
    (written.peft_rslora, LAYERS, over_root),
    (written.kohya_plain, LAYERS, one),
    (written.kohya_alpha, LAYERS, over_rank),
    (written.ours, LAYERS, over_rank),
    (peft_named, LAYERS, over_rank),
    (with_text_encoder, LAYERS, over_rank),
    (regular_patterns, LAYERS, over_rank),
    (kohya_half, LAYERS, over_rank),
]


IDS = [row[0].__name__ for row in FORMATS]


@pytest.fixture(scope="module")
def loras(base: UNet2DConditionModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return for each format a file, its updates by hand, and what `evaluate` uses of it."""
    files_of, deltas = {}, {}
    for (write, layers, scaling), name in zip(FORMATS, IDS, strict=True):
        made = Lora(base, layers)
        if write is kohya_half:
            for half in (made.downs, made.ups):
                half.update({layer: value.half().float() for layer, value in half.items()})
        place = tmp_path_factory.mktemp(name)
        files_of[name], deltas[name] = write(made, place), made.deltas(scaling)
    # One command for all: every LoRA is loaded into the same network, one after the other.
    seen = evaluated(files_of, tmp_path_factory.mktemp("evaluate"))
    return {name: (files_of[name], deltas[name], seen[name]) for name in IDS}


@pytest.mark.parametrize("name", IDS)
def test_every_format_is_the_same_lora_through_all_doors(
    base: UNet2DConditionModel, loras: dict[str, Any], run: Any, tmp_path: Path, name: str
) -> None:
    file, deltas, seen = loras[name]
    check(seen, base, deltas)
    check(mixed(run, file, tmp_path, base), base, deltas)
    check(started(file), base, deltas)


@pytest.mark.parametrize(("start", "dot"), [("diffusion_model.", "."), ("lora_unet_", "_")])
def test_the_originals_names_of_a_transformer_are_the_same_lora_through_all_doors(
    run: Any, tmp_path: Path, start: str, dot: str
) -> None:
    # Layers of the original code of Stable Diffusion 3, of the embedded flow's width.
    shapes = {
        "joint_blocks.0.x_block.attn.qkv": (288, 96),
        "joint_blocks.1.context_block.mlp.fc2": (96, 384),
        "joint_blocks.2.context_block.adaLN_modulation.1": (192, 96),
    }
    state, whole = {}, {}
    for number, (name, (out, inputs)) in enumerate(shapes.items()):
        down = 0.3 * randn(number, 2, inputs, dtype=torch.float32)
        up = 0.3 * randn(90 + number, out, 2, dtype=torch.float32)
        layer = f"{start}{name.replace('.', dot)}"
        state[f"{layer}.lora_down.weight"] = down
        state[f"{layer}.lora_up.weight"] = up
        state[f"{layer}.alpha"] = torch.tensor(3.0)
        whole[name] = 3.0 / 2 * up.double() @ down.double()
    file = tmp_path / "original.safetensors"
    save_file(state, file)
    fused, forward, modulation = whole.values()
    parts = zip("qkv", fused.split(96), strict=True)
    deltas = {f"transformer_blocks.0.attn.to_{x}": part for x, part in parts}
    deltas["transformer_blocks.1.ff_context.net.2"] = forward
    # There shift and scale, here scale and shift.
    deltas["transformer_blocks.2.norm1_context.linear"] = torch.cat(
        [modulation[96:], modulation[:96]]
    )
    network = SD3Transformer2DModel.from_pretrained(TINY_FLOW, subfolder="transformer")
    seen = evaluated({"x": file}, tmp_path, "--preset", "tiny_flow")

    check(seen["x"], network, deltas)
    check(started(file, "tiny_flow"), network, deltas)
    for kind in ("diffusers", "comfyui"):
        soup = ("soup", file, "base", "--coef", "1", "--format", kind, "-o", tmp_path / kind)
        code, err = run(*soup, "--quiet")
        assert code == 0, err
        made = files.read(tmp_path / kind / LORA_FILE)
        weights = {n: network.get_submodule(n).weight + f.delta() for n, f in made.layers.items()}
        check(weights, network, deltas)


def test_what_is_left_out_is_said_by_all_doors(
    base: UNet2DConditionModel, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = with_text_encoder(Lora(base, ATTENTION), tmp_path)
    loud = [word for word in QUICK if word != "--quiet"]
    _, evaluate = run("evaluate", file, *loud, "-o", tmp_path / "a")
    _, soup = run("soup", file, "base", "-o", tmp_path / "b")
    config = presets.resolve(preset="tiny", assignments=[f"lora.init={file}"])
    setup.prepare_lora(config, embedded(), None, Console())
    lora.unload(embedded().network.module)
    for err in (evaluate, soup, capsys.readouterr().err):
        assert "layers of the text encoder are left out" in " ".join(err.split())


# --- What is refused ---

NAME = "mid_block.attentions.0.proj_in"
X = f"unet.{NAME}"
PAIR = {f"{X}.lora_A.weight": torch.ones(2, 128), f"{X}.lora_B.weight": torch.ones(128, 2)}
PAIR = {name: value[..., None, None] for name, value in PAIR.items()}
K = "lora_unet_mid_block_attentions_0_proj_in"
KOHYA = {
    f"{K}.lora_down.weight": torch.ones(2, 128, 1, 1),
    f"{K}.lora_up.weight": torch.ones(128, 2, 1, 1),
}


def renamed(prefix: str) -> dict[str, Tensor]:
    return {name.replace("unet.", prefix): value for name, value in PAIR.items()}


def down(value: Tensor) -> dict[str, Tensor]:
    return PAIR | {f"{X}.lora_A.weight": value}


REFUSED: dict[str, tuple[dict[str, Tensor], str | None, int, str]] = {
    # Kinds of adapter: tensors, header, exit code, words.
    "dora": (KOHYA | {f"{K}.dora_scale": torch.ones(1, 128, 1, 1)}, None, 2, "is a DoRA"),
    "dora of an adapter": (
        PAIR | {f"{X}.lora_magnitude_vector.default_0.weight": torch.ones(1, 128, 1, 1)},
        None,
        3,
        "holds several adapters",
    ),
    "dora of a matrix": (
        PAIR | {f"{X}.lora_magnitude_vector": torch.ones(128)},
        None,
        3,
        "expected (1, 128, 1, 1)",
    ),
    "loha": ({f"{K}.hada_w1_a": torch.ones(2, 2)}, None, 2, "is a LoHa"),
    "lokr": ({f"{K}.lokr_w1": torch.ones(2, 2), f"{K}.alpha": torch.ones(())}, None, 2, "a LoKr"),
    "locon mid": (
        KOHYA | {f"{K}.lora_mid.weight": torch.ones(2, 2, 3, 3)},
        None,
        2,
        "is a LoCon with a Tucker factor",
    ),
    "biases": (PAIR | {f"{X}.lora_B.bias": torch.ones(128)}, None, 3, "unexpected tensor"),
    "whole weights": (PAIR | {"unet.conv_in.weight": torch.ones(3)}, None, 3, "unexpected tensor"),
    # Names that nothing knows.
    "no prefix": (renamed(""), None, 3, "unexpected tensor mid_block"),
    "of comfy": (renamed("diffusion_model."), None, 3, "ComfyUI's names, of a network"),
    "of the original": (renamed("model.diffusion_model."), None, 3, "unexpected tensor model"),
    "peft of a pipeline": (renamed("base_model.model.unet."), None, 3, "unexpected tensor base"),
    "another network": (renamed("lora_transformer_"), None, 3, "unexpected tensor lora_t"),
    # Tensors that are no factors.
    "0-d": (down(torch.tensor(1.0)), None, 3, "share no rank"),
    "rank 0": (
        {f"{X}.lora_A.weight": torch.ones(0, 128), f"{X}.lora_B.weight": torch.ones(128, 0)},
        None,
        3,
        "share no rank",
    ),
    "float8": (down(torch.ones(2, 128).to(torch.float8_e5m2)), None, 3, "is float8_e5m2"),
    "not finite": (down(torch.full((2, 128, 1, 1), torch.nan)), None, 4, "NaN or infinity"),
    "alpha of three": (PAIR | {f"{X}.alpha": torch.ones(3)}, None, 3, "expected one number"),
    "alpha 2 x 2": (KOHYA | {f"{K}.alpha": torch.ones(2, 2)}, None, 3, "expected one number"),
    # Configurations.
    "a number": (PAIR, "5", 3, "expected an object, got 5"),
    "a list": (PAIR, "[]", 3, "expected an object"),
    "nan": (PAIR, "NaN", 3, "not JSON: NaN is no finite number"),
    "unknown": (PAIR, '{"unet.nosuch": 1}', 3, "unknown option nosuch"),
    "corda": (PAIR, '{"init_lora_weights": "corda"}', 2, "changes the base model's weights"),
    "targets": (PAIR, '{"target_modules": 5}', 3, "names or a regular expression, got 5"),
    "pattern": (PAIR, '{"target_modules": "("}', 3, "names or a regular expression, got ("),
    "deep": (PAIR, '{"r": ' + "[" * 5000 + "]" * 5000 + "}", 3, "nested too deeply"),
    "surrogate": (PAIR, '{"peft_version": "\\ud800"}', 3, "half of a surrogate pair"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_refused_by_all_doors_with_one_message(
    run: Any, tmp_path: Path, case: str
) -> None:
    state, header, expected, words = REFUSED[case]
    file = tmp_path / "a.safetensors"
    metadata = {} if header is None else {"lora_adapter_metadata": header}
    if "peft" in case:
        (tmp_path / PEFT_CONFIG).write_text('{"r": 2, "lora_alpha": 2}', encoding="utf-8")
    save_file({name: value.clone() for name, value in state.items()}, file, metadata=metadata)
    out = tmp_path / "out"
    doors = {
        "evaluate": ("evaluate", file, *QUICK, "-o", out),
        "soup": ("soup", file, "base", "-o", out),
        "init": ("train", "--preset", "tiny", "--set", f"lora.init={file}", "-o", out),
        "dry run": ("train", "--preset", "tiny", "--set", f"lora.init={file}", "--dry-run"),
    }
    messages = set()
    for door in doors.values():
        code, err = run(*door)
        assert code == expected, err
        messages.add(" ".join(err.split()))
    (message,) = messages
    assert words in message
    assert message.startswith(f"error: {file}")
    assert not out.exists()


ELSEWHERE = {
    "another layer": (
        {n.replace("mid_block.attentions.0", "mid_block.attentions.7"): v for n, v in PAIR.items()},
        "it has a layer mid_block.attentions.7.proj_in, which this model lacks",
    ),
    "other inputs": (down(torch.ones(2, 64, 1, 1)), "takes 128 channels here, 64 there"),
    "a matrix": (
        {f"{X}.lora_A.weight": torch.ones(2, 128), f"{X}.lora_B.weight": torch.ones(128, 2)},
        "is (128, 128, 1, 1) here, (128, 128) there",
    ),
    "other outputs": (
        PAIR | {f"{X}.lora_B.weight": torch.ones(64, 2, 1, 1)},
        "is (128, 128, 1, 1) here, (64, 128, 1, 1) there",
    ),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_a_lora_of_another_network_is_refused_in_one_line(
    run: Any, tmp_path: Path, case: str
) -> None:
    # A soup has no network to compare with: what it makes is refused like its member.
    state, words = ELSEWHERE[case]
    file = tmp_path / "a.safetensors"
    save_file({name: value.clone() for name, value in state.items()}, file)
    assert run("soup", file, "base", "-o", tmp_path / "soup")[0] == 0
    for each in (file, tmp_path / "soup"):
        code, err = run("evaluate", each, *QUICK, "-o", tmp_path / "out")
        assert code == 2
        assert words in " ".join(err.split())
        with pytest.raises(Exception, match="does not belong to model tiny") as raised:
            started(each)
        assert "\n" not in str(raised.value)
        assert words in str(raised.value)


def test_a_folder_with_two_formats_and_links_are_found(
    base: UNet2DConditionModel, tmp_path: Path
) -> None:
    made = Lora(base, ATTENTION)
    run_folder = tmp_path / "run"
    (run_folder / "checkpoints").mkdir(parents=True)
    (run_folder / "config.yaml").write_text("{}")
    elsewhere = tmp_path / "disk" / "x"
    elsewhere.mkdir(parents=True)
    written.diffusers_down(made, elsewhere)
    # A checkpoint may be a link to another disk; a copy of one is none, nor a link to nowhere.
    (run_folder / "checkpoints" / "step-000003").symlink_to(elsewhere)
    (run_folder / "checkpoints" / "step-000009").symlink_to(tmp_path / "gone")
    (run_folder / "checkpoints" / "step-000008").write_text("no folder")
    shutil.copytree(elsewhere, run_folder / "checkpoints" / "step-backup-step-000007")
    names = [path.name for path in files.checkpoints(run_folder)]
    assert names == ["step-000003"]
    assert files.latest(run_folder).name == "step-000003"
    found = files.locate(str(run_folder / "checkpoints" / "step-000003"))
    assert found.run == run_folder.resolve()
    assert found.step == "step-000003"
    (tmp_path / "mine").symlink_to(run_folder / "checkpoints" / "step-000003")
    assert files.locate(str(tmp_path / "mine")).file.is_file()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "expected a path, got an empty text"),
        ("x" * 5000, "File name too long"),
        ("~nosuchuser/x", "is no path"),
        ("a\0b", "is no path"),
    ],
)
def test_what_can_be_no_path_is_said(run: Any, tmp_path: Path, name: str, words: str) -> None:
    for where, args in {
        "evaluate": ("evaluate", name, "--preset", "tiny"),
        "soup": ("soup", name, "base"),
        "--output": ("soup", tmp_path, "base", "-o", name),
    }.items():
        if where == "--output":
            save_file({n: v.clone() for n, v in PAIR.items()}, tmp_path / LORA_FILE)
        code, err = run(*args)
        assert code == 2
        assert f"error: {where}: " in err
        assert words in " ".join(err.split())
    code, err = run("train", "--preset", "tiny", "--set", f"lora.init={json.dumps(name)}")
    assert code == 2
    assert words in " ".join(err.split())
