"""LoRA files for others: ComfyUI's names, ModelSpec's header, and the same weights in diffusers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from alignprop_cli.cli import main
from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.errors import ConfigError
from alignprop_cli.lora import files, formats, modelspec
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.factors import Factors
from alignprop_cli.models.families import find
from alignprop_cli.models.published import PUBLISHED
from alignprop_cli.publishing import export, shared
from alignprop_cli.publishing.request import FILES, Request, read_kinds
from alignprop_cli.publishing.results import refuse_unpublished
from tests.factories import randn, small_pipeline, small_xl_pipeline
from tests.flow_models import randn_like_latents
from tests.models.test_merged import FLOWS, image, layers_of, written

CASES: dict[str, tuple[Callable[..., Path], Any]] = {
    "sd": (small_pipeline, StableDiffusionPipeline),
    "sdxl": (small_xl_pipeline, StableDiffusionXLPipeline),
}


def test_a_finished_run_that_lacks_what_is_asked_for_is_not_called_done(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    last = run / "checkpoints" / "step-000002"
    last.mkdir(parents=True)
    (last / "README.md").touch()
    asked = Request(("comfyui", "merged"), "me/mine")
    with pytest.raises(ConfigError, match="lacks what --export comfyui,merged") as told:
        refuse_unpublished(asked, run, dora=False)
    # The words are those that the commands take, quoted for a shell.
    command = f"alignprop soup '{last}' --export comfyui,merged --push-to-hub me/mine"
    assert told.value.hint == command
    with pytest.raises(ConfigError) as told:
        refuse_unpublished(Request(("merged",)), run, dora=True)
    assert told.value.hint == f"alignprop evaluate '{last}' --export merged"
    # Where the guard has stopped the run, the best checkpoint is the result.
    (last / "README.md").rename(last.with_name("README.md"))
    (run / "checkpoints" / "best").mkdir()
    (last.with_name("README.md")).rename(run / "checkpoints" / "best" / "README.md")
    with pytest.raises(ConfigError) as told:
        refuse_unpublished(asked, run, dora=False)
    assert told.value.hint is not None
    assert "checkpoints/best'" in told.value.hint
    # With everything there it is done.
    for folder in ("export/comfyui", "export/merged", "hub"):
        (run / folder).mkdir(parents=True)
    for words in ('{"id": "me/other", "address": null}', "[]", "{"):
        (run / "hub.json").write_text(words)
        with pytest.raises(ConfigError, match="lacks what --push-to-hub me/mine asks for"):
            refuse_unpublished(asked, run, dora=False)
    (run / "hub.json").write_text('{"id": "me/mine", "address": null}')
    refuse_unpublished(asked, run, dora=False)
    refuse_unpublished(Request(), tmp_path, dora=False)


def toy(**shapes: tuple[int, int]) -> dict[str, Factors]:
    """Return a LoRA of rank 2 and alpha 3 with layers of these shapes (out, in)."""
    return {
        name: Factors(
            randn(1, 2, inputs, dtype=torch.float32), randn(2, out, 2, dtype=torch.float32), 3.0
        )
        for name, (out, inputs) in shapes.items()
    }


def saved(
    folder: Path, layers: dict[str, Factors], header: dict[str, str] | None = None
) -> files.Adapter:
    folder.mkdir(parents=True)
    weights, settings = formats.packed(layers)
    prefix = "unet."
    return files.read(
        files.save(folder, weights, header or {}, prefix=prefix, adapter_metadata=settings)
    )


@pytest.mark.parametrize("name", CASES)
def test_the_export_has_comfyuis_names_and_the_same_update_in_diffusers(
    name: str, tmp_path: Path
) -> None:
    """ComfyUI: lora_unet_ and diffusers' name of the module, _ for dots (comfy/lora.py)."""
    build, kind = CASES[name]
    pipeline = kind.from_pretrained(build(tmp_path / "base"))
    modules = {
        module: layer
        for module, layer in pipeline.unet.named_modules()
        if module.endswith(("to_q", "to_out.0", "conv1", "proj_in"))
    }
    layers: dict[str, Factors] = {}
    for number, (module, layer) in enumerate(modules.items()):
        out, inputs, *kernel = layer.weight.shape
        down = randn(number, 2, inputs, *kernel, dtype=torch.float32)
        up = randn(100 + number, out, 2, *[1] * len(kernel), dtype=torch.float32)
        layers[module] = Factors(down, up, 3.0)
    adapter = saved(tmp_path / "lora", layers)
    (done,) = export.write(["comfyui"], adapter, None, tmp_path, "my run")
    assert done.path == tmp_path / "export" / "comfyui" / "my-run.safetensors"
    state = load_file(done.path)
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    flat = {module: f"lora_unet_{module.replace('.', '_')}" for module in modules}
    assert set(state) == {f"{layer}.{part}" for layer in flat.values() for part in parts}
    for layer in flat.values():
        assert float(state[f"{layer}.alpha"]) == 3.0
    # Back through diffusers' own conversion of kohya's format.
    pipeline.load_lora_weights(done.path)
    for module, factors in layers.items():
        found = pipeline.unet.get_submodule(module).get_delta_weight("default_0")
        torch.testing.assert_close(found, factors.delta().float(), rtol=1e-5, atol=1e-5)
    # And images: with the same update added to the weights by hand.
    latents = randn_like_latents((1, 4, 8, 8))
    shown = image(pipeline, latents, height=16, width=16)
    by_hand = kind.from_pretrained(tmp_path / "base")
    before = image(by_hand, latents, height=16, width=16)
    for module, one in layers.items():
        weight = by_hand.unet.get_submodule(module).weight
        weight.data += 1.5 * (one.up.flatten(1) @ one.down.flatten(1)).view(weight.shape)
    expected = image(by_hand, latents, height=16, width=16)
    torch.testing.assert_close(shown, expected, rtol=0.0, atol=1e-3)
    assert float((expected - before).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "name", ["sd3", *(pytest.param(n, marks=pytest.mark.long) for n in FLOWS if n != "sd3")]
)
def test_the_export_of_a_transformer_keeps_its_names_and_draws_the_same_images(
    name: str, tmp_path: Path
) -> None:
    """ComfyUI: transformer. and diffusers' name of the module, lora_A and lora_B (comfy/lora.py).

    Its loader takes an .alpha as well; diffusers' loaders do not, so the scaling is in B.
    """
    build, kind, shape = FLOWS[name]
    pipeline = kind.from_pretrained(build(tmp_path / "base"))
    layers = layers_of(pipeline, ("to_q", "to_v", "to_out.0", "to_qkv_mlp_proj"))
    assert len(layers) >= 5
    (done,) = export.write(
        ["comfyui"], written(tmp_path / "lora", layers, "transformer."), None, tmp_path, "r"
    )
    state = load_file(done.path)
    assert set(state) == {f"transformer.{n}.lora_{half}.weight" for n in layers for half in "AB"}
    # 1. Images of base and LoRA: (alpha / rank) B A added to the weights by hand.
    side = {"klein": 32, "zimage": 64, "krea2": 64}.get(name, 16)
    options = {"height": side, "width": side}
    latents = randn_like_latents(shape)
    before = image(pipeline, latents, **options)
    by_hand = kind.from_pretrained(tmp_path / "base")
    for module, one in layers.items():
        by_hand.transformer.get_submodule(module).weight.data += 1.5 * one.up @ one.down
    expected = image(by_hand, latents, **options)
    # 2. Those of the file, through diffusers' own loader.
    pipeline.load_lora_weights(done.path)
    for module, one in layers.items():
        found = pipeline.transformer.get_submodule(module).get_delta_weight("default_0")
        torch.testing.assert_close(found, 1.5 * one.up @ one.down, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(image(pipeline, latents, **options), expected, rtol=0.0, atol=1e-3)
    assert float((expected - before).abs().max()) > 1e-2
    # 3. With an .alpha these loaders refuse the file.
    if name != "flux1":
        alphas = {f"transformer.{module}.alpha": torch.tensor(2.0) for module in layers}
        with pytest.raises((ValueError, KeyError, RuntimeError)):
            by_hand.load_lora_weights({**state, **alphas})


def test_the_header_follows_modelspec_and_the_bytes_repeat(tmp_path: Path) -> None:
    header = {
        "alignprop.base_model": "stabilityai/stable-diffusion-xl-base-1.0",
        "alignprop.rewards": "hps,/data/own.py:Mine",
        "alignprop.config": "{}",
        "alignprop.merged_from": json.dumps([{"name": "/data/runs/a", "coefficient": 1.0}]),
    }
    adapter = saved(tmp_path / "lora", toy(**{"mid_block.attentions.0.proj_in": (4, 3)}), header)
    made = [
        export.write(["comfyui"], adapter, None, tmp_path / place, "t")[0].path for place in "ab"
    ]
    assert made[0].read_bytes() == made[1].read_bytes()
    with safe_open(made[0], "pt") as opened:
        found = opened.metadata()
    data = made[0].read_bytes()
    tensors = data[8 + int.from_bytes(data[:8], "little") :]
    digest = hashlib.sha256(tensors).hexdigest()
    expected = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "t",
        "modelspec.hash_sha256": f"0x{digest}",
        "modelspec.merged_from": "a",
        "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "3",
        "ss_network_args": "{}",
        "sshs_model_hash": digest,
    }
    assert expected.items() <= found.items()
    assert "hps, own.py:Mine" in found["modelspec.description"]
    assert b"/data" not in data
    assert "alignprop.config" not in found


@pytest.mark.parametrize(
    ("layers", "prefix", "expected"),
    [
        (toy(**{"a.attn2.to_k": (4, 768)}), "unet.", "stable-diffusion-v1"),
        (toy(**{"a.attn2.to_v": (4, 2048)}), "unet.", "stable-diffusion-xl-v1-base"),
        (toy(**{"a.attn2.to_v": (4, 32)}), "unet.", "unknown"),
        (toy(**{"a.attn1.to_v": (4, 768)}), "unet.", "unknown"),
        (toy(**{"transformer_blocks.0.attn2.to_q": (4, 4)}), "transformer.", "stable-diffusion-3"),
        (toy(**{"single_transformer_blocks.0.attn.to_q": (4, 4)}), "transformer.", "flux-1"),
        (
            toy(**{"single_transformer_blocks.0.attn.to_qkv_mlp_proj": (4, 4)}),
            "transformer.",
            "Flux.2",
        ),
        (toy(**{"layers.0.attention.to_q": (4, 4)}), "transformer.", "Z-Image"),
    ],
)
def test_without_a_known_model_the_layers_show_the_architecture(
    layers: dict[str, Factors], prefix: str, expected: str
) -> None:
    assert modelspec.architecture(layers, prefix, "/some/folder") == expected


def test_every_published_model_has_an_architecture() -> None:
    for model in PUBLISHED:
        assert modelspec.architecture({}, "transformer.", model) != "unknown"


def test_what_is_given_away_names_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    known = ("tiny", "stabilityai/sdxl-turbo")
    assert [shared.base_model(name) for name in known] == list(known)
    for local in ("owner/name", "./owner/other", "/data/x", "model.safetensors", "a\\b", "../x"):
        assert shared.base_model(local) is None
    assert shared.last_part("C:\\rewards\\own.py:A") == "own.py:A"
    assert shared.last_part("runs/first/") == "first"
    assert shared.header({"alignprop.merged_from": "[1]", "other": "x"}) == {}
    # Of a member what is known alone: a file of somebody else's may hold more.
    more = json.dumps([{"name": "/data/a", "coefficient": 1.0, "folder": "/data"}])
    kept = shared.header({"alignprop.merged_from": more})["alignprop.merged_from"]
    assert json.loads(kept) == [{"name": "a", "coefficient": 1.0}]


def test_a_dora_is_no_export_for_comfyui(tmp_path: Path) -> None:
    layers = {
        name: Factors(one.down, one.up, one.alpha, magnitude=torch.ones(4))
        for name, one in toy(**{"mid_block.attentions.0.proj_in": (4, 3)}).items()
    }
    with pytest.raises(ConfigError, match="this is a DoRA") as raised:
        export.write(["comfyui"], saved(tmp_path / "lora", layers), None, tmp_path, "t")
    assert "--export merged" in str(raised.value.hint)
    assert not (tmp_path / "export").exists()


def test_formats_are_read_with_commas_and_by_repeating() -> None:
    assert read_kinds(["merged, comfyui", "comfyui"]) == ("comfyui", "merged")
    assert read_kinds(None) == ()
    with pytest.raises(ConfigError, match="Did you mean 'merged'"):
        read_kinds(["merge"])


def test_a_soup_is_exported_from_the_command_line_and_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = small_pipeline(tmp_path / "base")
    model = find(ModelConfig(id=str(base)))
    assert model[0].single_files
    plain = StableDiffusionPipeline.from_pretrained(base)
    lora.inject(plain.unet, rank=2, alpha=2, target_modules=("to_q",), seed=0)
    place = tmp_path / "a"
    place.mkdir()
    weights, settings = lora.weights(plain.unet), lora.adapter_metadata(plain.unet)
    for name in weights:
        weights[name] += 0.1
    header = {"alignprop.base_model": "elsewhere/unknown"}
    files.save(place, weights, header, prefix="unet.", adapter_metadata=settings)

    def run(*more: str) -> tuple[int, str, str]:
        args = ["soup", str(place), "--output", str(tmp_path / "out"), *more]
        with pytest.raises(SystemExit) as ended:
            main(args)
        said = capsys.readouterr()
        code: Any = ended.value.code
        return code or 0, said.out, said.err

    kinds = "--export=comfyui,merged-single-file"
    code, out, err = run(kinds, "--export=merged", f"--model={base}", "--json")
    assert code == 0, err
    exports = json.loads(out)["exports"]
    assert set(exports) == {"comfyui", "merged", "merged-single-file"}
    found = StableDiffusionPipeline.from_pretrained(exports["merged"]).unet.state_dict()
    file = str(exports["merged-single-file"])
    single = StableDiffusionPipeline.from_single_file(file, config=str(base)).unet.state_dict()
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(found[key], single[key])
    down, up = (
        load_file(exports["comfyui"])[f"lora_unet_{_flat(key)}.lora_{h}.weight"]
        for h in ("down", "up")
    )
    before = plain.unet.get_submodule(key.removesuffix(".weight")).base_layer.weight
    torch.testing.assert_close(found[key], before + up @ down)
    # All of it is this command's, so it may be replaced.
    code, _, err = run("--overwrite", "--export=comfyui")
    assert code == 0, err
    assert not (tmp_path / "out" / "export" / "merged").exists()
    # A base model that nobody named is not fetched.
    code, _, err = run("--overwrite", "--export=merged")
    assert (code, "name it yourself" in " ".join(err.split())) == (2, True), err


def _flat(key: str) -> str:
    return key.removesuffix(".weight").replace(".", "_")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["soup", "a", "b", "--sweep=0:1:0.5", "--export=comfyui"], "not with --sweep"),
        (["soup", "a", "--format=comfyui", "--push-to-hub=me/x"], "goes with --format diffusers"),
        (["soup", "a", "--export=comfy"], "Did you mean 'comfyui'"),
        (
            ["evaluate", "a", "--model=tiny", "--scale=0.5", "--export=comfyui"],
            "goes with one LoRA",
        ),
        (["evaluate", "base", "--model=tiny", "--export=comfyui"], "goes with one LoRA"),
        (["train", "--preset=tiny", "--set=lora.dora=true", "--export=comfyui"], "is a DoRA"),
        (
            ["train", "--preset=tiny_flow", "--export=merged-single-file"],
            "is not written as a single file",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_before_any_work(
    args: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        saved(tmp_path / name, toy(**{"mid_block.attentions.0.proj_in": (4, 3)}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(args)
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert words in " ".join(said.err.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_of_a_lower_rank_is_a_soup_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The nearest matrix of rank 1 is the first term of the singular value decomposition."""
    layers = toy(**{"mid_block.attentions.0.proj_in": (4, 3)})
    saved(tmp_path / "a", layers)
    asked = ("--method=svd", "--rank=1", "--export=comfyui", "--json")
    with pytest.raises(SystemExit) as ended:
        main(["soup", str(tmp_path / "a"), *asked, f"--output={tmp_path / 'out'}"])
    assert not ended.value.code
    file = json.loads(capsys.readouterr().out)["exports"]["comfyui"]
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_network_dim"] == "1"
    state = load_file(file)
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    down, up = (state[f"{layer}.lora_{half}.weight"] for half in ("down", "up"))
    assert down.shape == (1, 3)
    (whole,) = (one.delta().float() for one in layers.values())
    u, s, v = torch.linalg.svd(whole)
    expected = s[0] * torch.outer(u[:, 0], v[0])
    torch.testing.assert_close(float(state[f"{layer}.alpha"]) * up @ down, expected)
    assert float((expected - whole).abs().max()) > 0.1


def test_every_file_that_is_written_may_be_replaced() -> None:
    import re

    written = (
        "export/comfyui/a.safetensors",
        "export/merged/model_index.json",
        "export/merged/unet/diffusion_pytorch_model.safetensors",
        "export/merged-single-file/a.safetensors",
        "README.md",
        "hub/README.md",
        "hub/pytorch_lora_weights.safetensors",
        "hub/before_after.png",
        "hub.json",
    )
    for name in written:
        assert any(re.fullmatch(one, name) for one in FILES), name
    for name in ("export/notes.txt", "hub/x/y.png", "export/merged/a/b/c/d", "docs/README.md"):
        assert not any(re.fullmatch(one, name) for one in FILES), name
