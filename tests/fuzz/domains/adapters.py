"""What training leaves: LoRA files and run folders."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.fuzz import strange
from tests.fuzz.assets import QUICK, Assets, copy_run
from tests.fuzz.domains.base import SMALL


def loras(rng: Random, place: Path, assets: Assets) -> list[str]:
    """LoRA files: their bytes, their tensors, and the texts in their headers."""
    kind = rng.choice(list(assets.loras))
    source = assets.loras[kind]
    name = "m.safetensors"
    if kind == "peft":
        shutil.copytree(source, place / "m")
        name, source = "m", source / "adapter_model.safetensors"
        if rng.random() < 0.5:
            config = place / "m" / "adapter_config.json"
            changed = strange.mutate(json.loads(config.read_text()), rng, rng.choice((1, 2)))
            with contextlib.suppress(RecursionError):
                config.write_bytes(json.dumps(changed).encode())
            if rng.random() < 0.2:
                config.write_bytes(strange.damage(config.read_bytes(), rng))
    file = place / "m" / source.name if kind == "peft" else place / name
    way = rng.randrange(10)
    if way < 3:
        file.write_bytes(strange.damage(source.read_bytes(), rng, rng.choice((1, 1, 3))))
    elif way < 5:
        file.write_bytes(damage_header(source.read_bytes(), rng))
    else:
        state = load_file(source)
        with safe_open(source, "pt") as opened:
            header = dict(opened.metadata() or {})
        if way < 8:
            state = _mutate_tensors(state, rng)
        if way >= 7:
            header = _mutate_texts(header, rng)
        save_file(state, file, metadata=header or None)
    door = rng.random()
    if door < 0.12:
        return ["evaluate", name, *rng.choice(([], ["--preset=tiny"])), "--output=e", *SMALL]
    if door < 0.16:
        small = (part for part in QUICK if "lora." not in part)
        return [
            "train",
            "--preset=tiny",
            "--steps=1",
            f"--set=lora.init={name}",
            "--output=r",
            *small,
        ]
    if door < 0.3:
        return ["train", "--preset=tiny", f"--set=lora.init={name}", "--dry-run"]
    method = rng.choice(("exact", "exact", "svd", "ties", "dare_linear", "factor"))
    members = rng.choice(([name, "base"], [name, str(assets.loras["ours"])], [name, name]))
    return ["soup", *members, "--coef=0.5", f"--method={method}", "--output=s"]


def damage_header(data: bytes, rng: Random) -> bytes:
    """Return a LoRA file with a header that is well-formed and says something else."""
    size = struct.unpack("<Q", data[:8])[0]
    header = strange.mutate(json.loads(data[8 : 8 + size]), rng, rng.choice((1, 1, 2)))
    try:
        text = json.dumps(header).encode("utf-8", "surrogatepass")
    except RecursionError:
        text = b"[" * 3000
    length = len(text) if rng.random() < 0.9 else rng.choice((0, 1, 2**40, 2**63, len(text) + 8))
    return struct.pack("<Q", length) + text + data[8 + size :]


def _mutate_tensors(state: dict[str, Any], rng: Random) -> dict[str, Any]:
    state = dict(state)
    for _ in range(rng.choice((1, 1, 3))):
        name = rng.choice(list(state))
        tensor = state[name]
        kind = rng.randrange(12)
        if kind == 0:
            del state[name]
        elif kind == 1:
            state[name] = tensor.sum().clone()
        elif kind == 2:
            state[name] = tensor.flatten().clone()
        elif kind == 3:
            state[name] = torch.atleast_1d(tensor)[..., :0].clone()
        elif kind == 4:
            state[name] = torch.atleast_1d(tensor)[:0].clone()
        elif kind == 5:
            dtype = rng.choice(
                (
                    torch.int64,
                    torch.bool,
                    torch.uint8,
                    torch.float16,
                    torch.bfloat16,
                    torch.float64,
                    torch.complex64,
                    torch.float8_e4m3fn,
                )
            )
            state[name] = tensor.to(dtype)
        elif kind == 6 and tensor.is_floating_point() and tensor.itemsize > 1:
            state[name] = torch.full_like(
                tensor, rng.choice((math.nan, math.inf, 1e38, 0.0, 1e-45))
            )
        elif kind == 7:
            base = name.rpartition(".lora")[0] or name.removesuffix(".weight")
            ending = rng.choice(
                (
                    "alpha",
                    "dora_scale",
                    "lora_magnitude_vector",
                    "lora_mid.weight",
                    "hada_w1_a",
                    "lokr_w1",
                    "diff",
                    "bias",
                    "rank_pattern",
                )
            )
            shape = rng.choice(((), (1,), (3,), (2, 2), (0,)))
            state[f"{base}.{ending}"] = torch.full(
                shape, rng.choice((0.0, -1.0, 2.0, math.nan, 1e30))
            )
        elif kind == 8:
            state[name] = tensor.T.contiguous() if tensor.ndim == 2 else tensor
        elif kind == 9:
            state[name] = torch.cat([tensor, tensor])
        elif kind == 10:
            new = rng.choice(
                (
                    name + ".x",
                    name.replace("unet", "text_encoder"),
                    name.replace("to_q", "to_z"),
                    "transformer." + name,
                    name.replace("lora", "oft"),
                    rng.choice(strange.TEXTS),
                    name.replace(".lora", ".default_0.lora"),
                )
            )
            # A header of safetensors is UTF-8.
            state[new.encode("utf-8", "replace").decode()] = state.pop(name)
        else:
            state[rng.choice(strange.TEXTS).encode("utf-8", "replace").decode()] = tensor.clone()
        if not state:
            break
    return state


def _mutate_texts(header: dict[str, str], rng: Random) -> dict[str, str]:
    header = dict(header)
    key = rng.choice(
        (
            *header,
            "lora_adapter_metadata",
            "alignprop.config",
            "alignprop.base_model",
            "ss_network_module",
            "ss_network_args",
            "modelspec.architecture",
        )
    )
    try:
        data = json.loads(header.get(key, "{}"))
    except ValueError:
        data = None
    if rng.random() < 0.7 and data:
        data = strange.mutate(data, rng, rng.choice((1, 2)))
        if rng.random() < 0.3 and isinstance(data, dict):
            data[
                rng.choice(
                    (
                        "unet.use_rslora",
                        "unet.use_dora",
                        "unet.rank_pattern",
                        "unet.alpha_pattern",
                        "unet.corda_config",
                        "unet.nosuch",
                        "unet.target_modules",
                    )
                )
            ] = strange.value(rng)
    else:
        data = strange.value(rng)
    with contextlib.suppress(RecursionError):
        header[key] = rng.choice((json.dumps(data), json.dumps(data), str(data)))
    return {k: v.encode("utf-8", "replace").decode() for k, v in header.items()}


def runs(rng: Random, place: Path, assets: Assets) -> list[str]:
    """Run folders, resumed and evaluated."""
    run = copy_run(assets, place)
    for _ in range(rng.choice((1, 1, 2))):
        _spoil(run, rng)
    door = rng.random()
    if door < 0.25:
        return ["evaluate", "run", *SMALL]
    if door < 0.5:
        return [
            "train",
            "--resume=run",
            "--steps=3",
            *rng.choice(([], ["--set=output.keep_last=1"])),
        ]
    if door < 0.85:
        return ["train", "--resume=run", "--steps=3", "--dry-run"]
    return ["soup", "run", "base", "--output=s"]


def _no_files(folder: str, names: list[str]) -> list[str]:
    """Return what cannot be copied: a pipe would be read for ever."""
    return [
        n for n in names if not (Path(folder) / n).is_file() and not (Path(folder) / n).is_dir()
    ]


def _spoil(run: Path, rng: Random) -> None:
    """Damage a file of a run, or add a folder that looks like a checkpoint."""
    last = run / "checkpoints" / "step-000002"
    states = (
        "state.json",
        "state.json",
        "optimizer.safetensors",
        "pytorch_lora_weights.safetensors",
    )
    own = [run / name for name in ("config.yaml", "config.yaml", "metrics.jsonl")]
    file = rng.choice((*own, *(last / name for name in states)))
    if not file.is_file():
        return
    data = file.read_bytes()
    kind = rng.randrange(8)
    if kind < 3 and file.suffix in (".yaml", ".json", ".jsonl"):
        many = file.suffix == ".jsonl"
        try:
            parsed = [json.loads(x) for x in data.splitlines()] if many else yaml.safe_load(data)
        except (ValueError, yaml.YAMLError):
            return  # damaged before
        changed = strange.mutate(parsed, rng, rng.choice((1, 2)))
        with contextlib.suppress(RecursionError):
            lines = changed if many and isinstance(changed, list) else [changed]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif kind < 5:
        file.write_bytes(strange.damage(data, rng, rng.choice((1, 1, 3))))
    elif kind == 5:
        file.unlink()
        rng.choice((Path.exists, Path.mkdir, lambda p: p.symlink_to("nosuch"), os.mkfifo))(file)
    elif kind == 6:
        file.write_bytes(b"")
    else:
        names = ("step-000003", "step-backup", "step-" + "9" * 20, "step-000000", ".step-4-x")
        other = run / "checkpoints" / rng.choice(names)
        if not other.exists():
            makes = (
                Path.mkdir,
                lambda path: path.write_text("x"),
                lambda path: path.symlink_to("step-000001"),
                lambda path: shutil.copytree(last, path, symlinks=True, ignore=_no_files),
            )
            rng.choice(makes)(other)
