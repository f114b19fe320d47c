"""LoRA files are found, read with their real scaling, and written so that they read the same."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from alignprop_cli.errors import AssetError
from alignprop_cli.lora import files as adapter
from alignprop_cli.lora import formats
from alignprop_cli.lora.factors import Factors
from alignprop_cli.lora.files import LORA_FILE, PEFT_FILE


def save(
    path, settings=None, *, rank=2, names=("unet.x.to_q", "unet.y.to_k"), extra=None, peft=False
):
    """Write a LoRA file with constant weights."""
    down, up = (
        (".lora_A.weight", ".lora_B.weight") if peft else (".lora.down.weight", ".lora.up.weight")
    )
    state = {}
    for name in names:
        state |= {name + down: torch.ones(rank, 4), name + up: torch.ones(6, rank)}
    header = {"format": "pt"}
    if settings is not None:
        header["lora_adapter_metadata"] = json.dumps({f"unet.{k}": v for k, v in settings.items()})
    save_file(state | (extra or {}), path, metadata=header)
    return path


def scalings(path):
    return {name: factors.scaling for name, factors in adapter.read(path).layers.items()}


def test_a_missing_alpha_is_the_rank(tmp_path):
    assert scalings(save(tmp_path / "a.safetensors")) == {"x.to_q": 1.0, "y.to_k": 1.0}


def test_alpha_comes_from_the_header_and_its_patterns(tmp_path):
    settings = {"r": 2, "lora_alpha": 4, "alpha_pattern": {"to_k": 1}}
    assert scalings(save(tmp_path / "a.safetensors", settings)) == {"x.to_q": 2.0, "y.to_k": 0.5}


def test_rslora_is_read_with_its_real_scaling(tmp_path):
    settings = {"r": 4, "lora_alpha": 4, "use_rslora": True}
    path = save(tmp_path / "a.safetensors", settings, rank=4)
    assert scalings(path) == {"x.to_q": 2.0, "y.to_k": 2.0}


def test_peft_names_and_alphas_beside_the_weights_are_read(tmp_path):
    extra = {"unet.x.to_q.alpha": torch.tensor(8.0)}
    path = save(tmp_path / "a.safetensors", extra=extra, peft=True)
    assert scalings(path) == {"x.to_q": 4.0, "y.to_k": 1.0}


def test_what_is_written_reads_back_with_the_rank_of_every_layer(tmp_path):
    layers = {
        "x.to_q": Factors(torch.rand(2, 4), torch.rand(6, 2), 2.0),
        "y.to_q": Factors(torch.rand(5, 4), torch.rand(6, 5), 5.0),
    }
    weights, settings = formats.packed(layers)
    header = {"alignprop.version": "0"}
    file = adapter.save(tmp_path, weights, header, prefix="unet.", adapter_metadata=settings)
    read = adapter.read(file)
    assert file.name == LORA_FILE
    assert read.header["alignprop.version"] == "0"
    for name, factors in layers.items():
        torch.testing.assert_close(read.layers[name].delta(), factors.delta(), rtol=0, atol=0)
    settings = json.loads(read.header["lora_adapter_metadata"])
    other = {"y.to_q": 5} if settings["unet.r"] == 2 else {"x.to_q": 2}
    assert settings["unet.rank_pattern"] == settings["unet.alpha_pattern"] == other


def test_a_run_means_its_newest_checkpoint(tmp_path):
    run = tmp_path / "run"
    for step in (2, 10):
        folder = run / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        save(folder / LORA_FILE)
    (run / "config.yaml").write_text("{}")
    newest = run / "checkpoints" / "step-000010"
    assert adapter.locate(str(run)) == adapter.Located(newest / LORA_FILE, run=run)
    oldest = run / "checkpoints" / "step-000002"
    found = adapter.locate(str(oldest))
    assert found == adapter.Located(oldest / LORA_FILE, run=run.resolve(), step="step-000002")
    assert adapter.locate(str(oldest / LORA_FILE)).file == oldest / LORA_FILE


def test_what_does_not_exist_is_said(tmp_path):
    with pytest.raises(AssetError, match="no such file or folder"):
        adapter.locate(str(tmp_path / "none"))
    with pytest.raises(AssetError, match="holds no LoRA"):
        adapter.locate(str(tmp_path))


def test_a_copy_of_a_checkpoint_is_none(tmp_path):
    for name in ("step-000002", "step-backup-step-000002", "step-000002-old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in adapter.checkpoints(tmp_path)] == ["step-000002"]


def test_a_folder_of_peft_is_found_and_named_after_itself(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    save(folder / PEFT_FILE)
    found = adapter.locate(str(folder))
    assert found == adapter.Located(folder / PEFT_FILE)
    assert found.label == "mine"


def test_a_damaged_header_is_said(tmp_path):
    path = save(tmp_path / "a.safetensors", {"lora_alpha": "many"})
    with pytest.raises(AssetError, match=r"alpha of layer x\.to_q"):
        adapter.read(path)
    with pytest.raises(AssetError, match=r"alignprop\.config"):
        adapter.recorded_config({"alignprop.config": "{"}, path)
    assert adapter.recorded_config({}, path) is None


def test_kohyas_format_is_read_with_its_alphas_and_without_the_text_encoder(tmp_path):
    layer = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    state = {
        f"{name}.{part}": value
        for name in (f"lora_unet_{layer}", text)
        for part, value in (
            ("lora_down.weight", torch.full((4, 6), 0.5)),
            ("lora_up.weight", torch.full((5, 4), 2.0)),
            ("alpha", torch.tensor(1.0)),
        )
    }
    save_file(state, tmp_path / "kohya.safetensors")
    found = adapter.read(tmp_path / "kohya.safetensors")
    (name,) = found.layers
    assert found.prefix == "unet."
    assert name == "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    # alpha / rank B A = 1/4 x 4 x 2.0 x 0.5
    torch.testing.assert_close(found.layers[name].delta(), torch.ones(5, 6, dtype=torch.float64))
    assert found.left_out == 1


WRITE = """
import sys
from pathlib import Path
import torch
from alignprop_cli.lora.tensor_file import save_tensors

tensors = {f"b.{n}": torch.full((n, 2), n, dtype=torch.bfloat16) for n in range(1, 9)}
tensors |= {f"a.{n}": torch.arange(3.0) + n for n in range(9)} | {"i": torch.arange(3)}
texts = {f"key {n}": "text " + chr(0x1F600 + n) for n in range(30)}
save_tensors(Path(sys.argv[1]), tensors, {"format": "pt", **texts})
"""


def test_the_same_tensors_and_texts_are_the_same_bytes(tmp_path):
    # Two processes, as safetensors' order of the texts is drawn once for each.
    found = []
    for name in ("a", "b"):
        file = tmp_path / name
        subprocess.run([sys.executable, "-c", WRITE, str(file)], check=True)
        found.append(hashlib.sha256(file.read_bytes()).hexdigest())
    assert found[0] == found[1]
    # Plain safetensors reads what was written.
    state = load_file(tmp_path / "a")
    assert len(state) == 18
    assert torch.equal(state["b.3"], torch.full((3, 2), 3, dtype=torch.bfloat16))
    assert torch.equal(state["a.4"], torch.arange(3.0) + 4)
    assert torch.equal(state["i"], torch.arange(3))
    with safe_open(tmp_path / "a", "pt") as opened:
        metadata = opened.metadata()
    assert len(metadata) == 31
    assert metadata["key 7"] == "text \U0001f607"
    # Its header is as long as safetensors wants it, so that tensors are aligned.
    assert int.from_bytes((tmp_path / "a").read_bytes()[:8], "little") % 8 == 0


def test_a_lora_is_written_as_the_same_bytes(tmp_path):
    layers = {f"x.{n}.to_q": Factors(torch.rand(2, 4), torch.rand(6, 2), 2.0) for n in range(4)}
    weights, settings = formats.packed(layers)
    header = {f"alignprop.{n}": str(n) for n in range(12)}
    written = []
    for name in "abcd":
        (tmp_path / name).mkdir()
        # The order of the texts makes no difference.
        mixed = dict(sorted(header.items(), reverse=name > "b"))
        options = {"prefix": "unet.", "adapter_metadata": settings}
        written.append(adapter.save(tmp_path / name, weights, mixed, **options).read_bytes())
    assert len(set(written)) == 1


def test_a_configuration_in_a_header_is_an_object(tmp_path):
    for text in ("[]", '[["a", 1]]', "5", "null", '{"a": NaN}', "[" * 9000, '{"a": "\\ud800"}'):
        with pytest.raises(AssetError, match=r"alignprop\.config in its header is damaged: "):
            adapter.recorded_config({"alignprop.config": text}, tmp_path / "a")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in a folder")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / LORA_FILE)
    for read in (adapter.read, adapter.read_header):
        with pytest.raises(AssetError, match="is no file"):
            read(tmp_path / LORA_FILE)
