"""The kinds of inputs: each function writes one into an empty folder, and returns a command.

An input is a function of the numbers that its generator of random numbers gives, so a number is all
that has to be kept to make it again. Most commands are cheap: they read the input and do little.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.fuzz import strange
from tests.fuzz.assets import GRAPH, INFOTEXT, QUICK, Assets, copy_run

PRESETS = Path(__file__).parent.parent.parent / "presets"

# With these a mutated configuration is still sampled in little time.
SMALL = (
    "--images=1",
    "--batch-size=1",
    "--set=sample.num_inference_steps=2",
    "--set=gradient.k_max=1",
    "--set=sample.height=null",
    "--set=sample.width=null",
)

Domain = Callable[[Random, Path, Assets], list[str]]


def configs(rng: Random, place: Path, assets: Assets) -> list[str]:
    """YAML files: presets with values changed, with bytes changed, and tricks of the language."""
    file = place / "c.yaml"
    source = rng.choice(("tiny", "tiny", "tiny_mix", "aesthetic", "count", "hps"))
    text = (PRESETS / f"{source}.yaml").read_text(encoding="utf-8")
    kind = rng.randrange(10)
    if kind < 5:
        data = strange.mutate(yaml.safe_load(text), rng, rng.choice((1, 1, 2, 4)))
        with contextlib.suppress(RecursionError):
            text = _yaml(data, rng)
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif kind < 8:
        file.write_bytes(strange.damage(text.encode(), rng, rng.choice((1, 2, 5))))
    else:
        file.write_bytes(_trick(rng, place).encode("utf-8", "surrogatepass"))
    how = ["--show-preset", "--dry-run", "--dry-run", "--show-preset"][rng.randrange(4)]
    # The plan of a real model takes seconds.
    if not source.startswith("tiny") and rng.random() < 0.9:
        how = "--show-preset"
    return ["train", "--config=c.yaml", how, *rng.choice(([], [], ["--json"]))]


def _yaml(data: Any, rng: Random) -> str:
    if rng.random() < 0.3:
        return json.dumps(data, ensure_ascii=rng.random() < 0.5)
    return yaml.dump(data, sort_keys=False, allow_unicode=True)


def _trick(rng: Random, place: Path) -> str:
    levels = rng.choice((3, 9, 30))
    bomb = "a0: &a0 {x: 1, y: 2}\n" + "".join(
        f"a{n}: &a{n} {{" + ", ".join(f"k{i}: *a{n - 1}" for i in range(9)) + "}\n"
        for n in range(1, levels)
    )
    if rng.random() < 0.3 and not (place / "pipe.yaml").exists():
        os.mkfifo(place / "pipe.yaml")
        (place / "loop.yaml").symlink_to("loop.yaml")
        (place / "self.yaml").write_text("extends: self.yaml\n")
        (place / "long.yaml").write_text("extends: " + "x" * 300 + ".yaml\n")
        for number in range(60):
            (place / f"n{number}.yaml").write_text(f"extends: n{number + 1}.yaml\n")
        (place / "n60.yaml").write_text("extends: tiny\n")
        name = rng.choice(
            (
                "pipe.yaml",
                "loop.yaml",
                "self.yaml",
                "./sub/../self.yaml",
                "long.yaml",
                "n0.yaml",
                "/dev/zero",
                "/dev/null",
                ".",
                "",
                "c.yaml",
                "./c.yaml",
                "../x/c.yaml",
                "nosuch.yaml",
                "~nosuchuser/c.yaml",
                rng.choice(strange.TEXTS),
            )
        )
        return "extends: " + json.dumps(name) + "\n"
    return rng.choice(
        (
            bomb,
            "&a {train: *a}\n",
            "train: &a [*a]\n",
            "[" * rng.choice((10, 60, 5000)),
            "{a: " * rng.choice((10, 60, 2000)),
            "- " * rng.choice((10, 60, 2000)) + "1\n",
            "extends: tiny\ntrain: {<<: {steps: 3}}\n",
            "extends: tiny\ntrain:\n  seed: "
            + rng.choice(("010", "1:30", "0x1f", "0o17", "1_000", "+3")),
            "extends: tiny\nlora: {alpha: "
            + rng.choice(("1e3", "1.e+3", ".5", ".inf", "no", "off", "~"))
            + "}",
            "extends: tiny\n? [a, b]\n: c\n",
            "extends: tiny\n? {a: b}\n: c\n",
            "extends: tiny\n!!str train: {steps: !!int x}\n",
            "extends: tiny\ntrain: !!"
            + rng.choice(
                (
                    "set {a}",
                    "omap [a: 1]",
                    "binary aGk=",
                    "timestamp x",
                    "bool x",
                    "python/object:os.system x",
                    "null x",
                    "float ''",
                    "int ''",
                )
            ),
            "%YAML 9.9\n---\nextends: tiny\n",
            "%TAG ! tag:x,2000:\n---\nextends: tiny\n",
            "---\nextends: tiny\n---\nextends: tiny\n",
            "extends: tiny\ntrain:\n\tsteps: 3\n",
            "extends: tiny\nextends: tiny\n",
            "extends: tiny\r\ntrain:\r\n  steps: 3\r\n",
            "extends: [tiny, tiny]\n",
            'extends: tiny\nreward: {clip: {model: tiny}, "\\0": {}}\n',
            'extends: tiny\nreward: {"x.py:f": {}, "a:b:c": {}, ":": {}}\n',
            "# only a comment\n",
            "",
            "\ufeffextends: tiny\n",
            'extends: tiny\nlora: {target_modules: "'
            + rng.choice(("(", "(a+)+$", "\\\\", ".*", ""))
            + '"}\n',
            "1: 2\nnull: 3\n? ''\n: 4\n1.5: 6\ntrue: 7\n",
            "extends: tiny\ntrain: {steps: " + "9" * rng.choice((20, 400, 5000)) + "}\n",
            'extends: tiny\nmodel: {id: "'
            + rng.choice(("..", "a/b/c", "a/b", "-x/y", "a" * 300, "\\ud800", "\\e[2J"))
            + '"}\n',
        )
    )


PLAUSIBLE = (
    "1", "2", "3", "5", "8", "16", "64", "0", "0.1", "0.5", "1.5", "1e-3", "true", "false", "null",
    "auto", "none", "full", "last_k", "gaussian_k", "target", "hinge", "float16", "bfloat16",
    "tiny", "clip", "shapes", "animals-eval", "[to_q]", "[to_k,to_v]", "'to_[qk]'", "[0.2,0.8]",
    "{}", "{clip: {model: tiny}}", "{brightness: {weight: -1}}", "{kind: hinge, target: 1.0}",
)  # fmt: skip
"""Values that some keys may have."""


def assignments(rng: Random, place: Path, assets: Assets) -> list[str]:
    """Texts of `--set`."""
    import alignprop_cli.config.schema as schema

    sets = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        section = rng.choice(list(schema.Config.model_fields))
        fields = getattr(schema.Config.model_fields[section].annotation, "model_fields", {})
        inner = rng.choice(list(fields) or ["clip.model", "clip.weight", "brightness.loss", "x"])
        key = rng.choice(
            (f"{section}.{inner}", f"{section}.{inner}", section, f"{section}.{inner}.x")
        )
        if rng.random() < 0.1:
            key = rng.choice(strange.TEXTS)
        found = strange.value(rng)
        with contextlib.suppress(RecursionError):
            plain = rng.choice(PLAUSIBLE)
            # Many are taken as they are: else nothing behind the checks would be tried.
            if inner in fields and rng.random() < 0.5:
                default = fields[inner].get_default(call_default_factory=True)
                plain = json.dumps(default * 2 if type(default) is int else default)
            odd = (str(found), json.dumps(found), _trick(rng, place)[:500], "&a [*a]")
            text = plain if rng.random() < 0.6 else rng.choice(odd)
            if rng.random() < 0.2:
                text = strange.damage(text.encode("utf-8", "replace"), rng).decode(
                    "utf-8", "replace"
                )
            sets.append(f"--set={key}{rng.choice(('=', '=', '=', '', ':', '=='))}{text}")
    how = "--dry-run" if rng.random() < 0.1 else "--show-preset"
    return ["train", "--preset=tiny", how, *(_argument(text) for text in sets)]


def _argument(text: str) -> str:
    """Return a text as an argument that the operating system can pass on."""
    return (
        text.replace("\0", "").encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    )


def prompts(rng: Random, place: Path, assets: Assets) -> list[str]:
    """Prompt files of all four formats."""
    suffix = rng.choice((".txt", ".json", ".jsonl", ".csv"))
    texts = [rng.choice((*strange.TEXTS, "a red circle", "two blue squares")) for _ in range(5)]
    rows: Any = [
        rng.choice(
            (
                text,
                {rng.choice(("prompt", "text", "caption", "x")): text, "group": strange.value(rng)},
            )
        )
        for text in texts
    ]
    if rng.random() < 0.6:
        rows = strange.mutate(rows, rng, rng.choice((1, 2)))
    with contextlib.suppress(RecursionError):
        if suffix == ".json":
            data = json.dumps(rows, ensure_ascii=rng.random() < 0.5)
        elif suffix == ".jsonl":
            lines = rows if isinstance(rows, list) else [rows]
            data = "\n".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in lines)
        elif suffix == ".csv":
            table = io.StringIO()
            writer = csv.writer(table)
            writer.writerow(
                rng.choice((["prompt", "group"], ["text"], ["x"], ["prompt", "prompt"], []))
            )
            writer.writerows(
                [text.replace("\r", " "), 1][: rng.choice((1, 2, 2))] for text in texts
            )
            data = table.getvalue()
        else:
            data = "\n".join(texts)
        raw = data.encode(
            rng.choice(("utf-8", "utf-8", "utf-16", "utf-8-sig", "latin-1")), "replace"
        )
        if rng.random() < 0.1:
            raw = data.encode("utf-8", "surrogatepass")
        if rng.random() < 0.4:
            raw = strange.damage(raw, rng)
        (place / f"p{suffix}").write_bytes(raw)
    name = f"p{suffix}"
    if rng.random() < 0.05:
        os.mkfifo(place / "pipe.txt")
        name = rng.choice(("pipe.txt", ".", "/dev/zero", "~nosuchuser/p.txt", "p", "p.yaml"))
    if rng.random() < 0.04:
        return ["evaluate", "base", "--preset=tiny", f"--prompts={name}", "--output=e", *SMALL]
    if rng.random() < 0.03:
        return [
            "train",
            "--preset=tiny",
            "--steps=1",
            f"--set=train.prompts={name}",
            "--output=r",
            *QUICK,
        ]
    key = rng.choice(("train.prompts", "eval.prompts"))
    return ["train", "--preset=tiny", "--dry-run", f"--set={key}={name}"]


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
        file.write_bytes(_damage_header(source.read_bytes(), rng))
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


def _damage_header(data: bytes, rng: Random) -> bytes:
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


def images(rng: Random, place: Path, assets: Assets) -> list[str]:
    """Image files of all formats, damaged and cut."""
    folder = place / "i"
    folder.mkdir()
    for number in range(rng.choice((1, 3, 6))):
        name = rng.choice(list(assets.images))
        data = assets.images[name]
        if rng.random() < 0.9:
            data = strange.damage(data, rng, rng.choice((1, 1, 2, 6)))
        # The suffix need not be that of the format, nor a name be UTF-8.
        suffix = rng.choice((Path(name).suffix, Path(name).suffix, ".png", ".jpg", ".tif", ".JPEG"))
        stem = rng.choice(
            (
                str(number),
                str(number),
                f"{number}\x1b[31m",
                f"{number}[red]",
                f"{number}\udcff",
                f"{number} \u202e",
                f"-{number}",
                f"{number}\n",
            )
        )
        (folder / f"{stem}{suffix}").write_bytes(data)
    return _score(rng, "i")


def _score(rng: Random, *paths: str) -> list[str]:
    rest = rng.choice(
        (
            ["--json"],
            [],
            ["--output=o.csv"],
            ["--output=o.jsonl"],
            ["--output=o.parquet"],
            ["--format=csv"],
            ["--output=o.csv", "--gallery"],
            ["--strict"],
            ["--top=2"],
            ["--workers=1"],
            ["--format=jsonl"],
        )
    )
    reward = "brightness"
    if rng.random() < 0.04:
        reward, rest = "clip", [*rest, "--set=reward.clip.model=tiny"]
    return ["score", *paths, f"--reward={reward}", *rest]


def texts(rng: Random, place: Path, assets: Assets) -> list[str]:
    """Texts inside and beside images: PNG, EXIF, A1111, ComfyUI, tables, captions."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    folder = place / "i"
    folder.mkdir()
    image = Image.new("RGB", (8, 8))
    for number in range(rng.choice((1, 3))):
        inside = PngInfo()
        for _ in range(rng.choice((1, 2))):
            key = rng.choice(("prompt", "parameters", "workflow", "UserComment", "Comment", "x"))
            text = _text(rng).encode("utf-8", "replace").decode().replace("\0", "")
            if rng.random() < 0.5:
                inside.add_itxt(key, text, zip=rng.random() < 0.5)
            else:
                inside.add_text(key, text, zip=rng.random() < 0.5)
        file = folder / f"{number}.png"
        if rng.random() < 0.25:
            # A chunk of text with the wrong checksum, key or compression.
            image.save(file)
            data = file.read_bytes()
            body = rng.choice(
                (b"prompt\0", b"\0\0", b"parameters\0\0\0\0\0", b"prompt\0\1\0en\0x\0")
            )
            body += strange.damage(_text(rng).encode("utf-8", "replace"), rng)
            name = rng.choice((b"tEXt", b"zTXt", b"iTXt", b"eXIf"))
            chunk = (
                struct.pack(">I", len(body))
                + name
                + body
                + struct.pack(">I", zlib.crc32(name + body))
            )
            file.write_bytes(data[:33] + chunk + data[33:])
        elif rng.random() < 0.3:
            exif = Image.Exif()
            encoding = rng.choice((b"UNICODE\0", b"ASCII\0\0\0", b"\0" * 8, b"JIS\0\0\0\0\0", b"x"))
            codec = rng.choice(("utf-16-be", "utf-16-le", "utf-8", "utf-16"))
            comment = encoding + _text(rng).encode(codec, "replace")
            exif.get_ifd(0x8769)[0x9286] = rng.choice(
                (comment, comment, strange.damage(comment, rng))
            )
            exif[0x0112] = rng.choice((1, 6, 9, 0))
            image.save(folder / f"{number}.jpg", exif=exif)
        else:
            image.save(file, pnginfo=inside)
    if rng.random() < 0.4:
        caption = _text(rng).encode(rng.choice(("utf-8", "utf-16", "latin-1")), "replace")
        (folder / f"0{rng.choice(('.txt', '.caption'))}").write_bytes(caption)
    options = []
    if rng.random() < 0.4:
        rows = strange.mutate(
            [{"file_name": f"{n}.png", "prompt": "a cat"} for n in range(3)], rng, 2
        )
        table = rng.choice(("metadata.jsonl", "metadata.csv", "table.jsonl", "table.csv"))
        with contextlib.suppress(RecursionError):
            lines = rows if isinstance(rows, list) else [rows]
            data = "\n".join(json.dumps(row) for row in lines).encode()
            if table.endswith("csv"):
                data = b'file_name,prompt\n0.png,a cat\n1.png,"a\nb"\n'
            (folder / table).write_bytes(strange.damage(data, rng) if rng.random() < 0.5 else data)
        if table.startswith("table") and (folder / table).exists():
            options = [f"--prompts=i/{table}"]
    return [*_score(rng, "i"), *options]


def _text(rng: Random) -> str:
    kind = rng.randrange(6)
    if kind < 2:
        graph = strange.mutate(GRAPH, rng, rng.choice((0, 1, 2, 4)))
        with contextlib.suppress(RecursionError):
            return json.dumps(graph)
        return "{" * 3000
    if kind == 2:
        return strange.damage(INFOTEXT.encode(), rng, 2).decode("utf-8", "replace")
    if kind == 3:
        return strange.damage(json.dumps(GRAPH).encode(), rng).decode("utf-8", "replace")
    return rng.choice((*strange.TEXTS, INFOTEXT, '{"a":' * 2000, "[" * 5000))


def rows(rng: Random, place: Path, assets: Assets) -> list[str]:
    """Rows of an earlier run of `score`, finished and not, for --resume."""
    shutil.copytree(assets.pictures, place / "pictures")
    suffix = rng.choice(("csv", "jsonl", "jsonl", "parquet"))
    data = assets.rows[suffix]
    name = f"o.{suffix}"
    if rng.random() < 0.5:
        settings = {
            "schema": "alignprop.score.partial/1",
            "rewards": {
                "brightness": {
                    "weight": 1.0,
                    "loss": None,
                    "dtype": "float32",
                    "standardise": False,
                    "base_mean": None,
                    "base_std": None,
                }
            },
            "prompt": None,
            "prompts": None,
        }
        done = [json.loads(line) for line in assets.rows["jsonl"].splitlines()][: rng.randrange(5)]
        lines: Any = [settings, *done]
        if rng.random() < 0.8:
            # The first line, too: it decides whether the others are taken.
            kept = lines if rng.random() < 0.3 else lines[1:]
            changed = strange.mutate(kept, rng, rng.choice((1, 1, 2)))
            lines = [
                *lines[: len(lines) - len(kept)],
                *(changed if isinstance(changed, list) else [changed]),
            ]
        with contextlib.suppress(RecursionError):
            data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        name += ".partial"
    elif suffix == "jsonl":
        lines = [json.loads(line) for line in data.splitlines()]
        lines = strange.mutate(lines, rng, rng.choice((1, 1, 2)))
        with contextlib.suppress(RecursionError):
            data = "".join(
                json.dumps(line) + "\n" for line in (lines if isinstance(lines, list) else [lines])
            ).encode()
    else:
        data = strange.damage(data, rng, rng.choice((1, 1, 3)))
    if rng.random() < 0.3:
        data = strange.damage(data, rng)
    (place / name).write_bytes(data)
    more = rng.choice(([], [], ["--gallery"], ["--top=2"], ["--json"], ["--prompt=x"]))
    # In the folder of the assets' pictures, whose names the rows have.
    return ["score", "pictures", "--reward=brightness", f"--output=o.{suffix}", "--resume", *more]


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


def flags(rng: Random, place: Path, assets: Assets) -> list[str]:
    """Command lines: known flags with strange values, and strange flags."""
    (place / "pictures").symlink_to(assets.pictures)
    run = copy_run(assets, place)
    (place / "file.txt").write_text("a red circle\n")
    command = rng.choice(("train", "evaluate", "soup", "score", rng.choice(strange.TEXTS)))
    names = {
        "train": (
            "--preset",
            "--config",
            "--set",
            "--reward",
            "--model",
            "--steps",
            "--seed",
            "--resume",
            "--gpu-memory",
            "--gpus",
            "--json",
            "--quiet",
            "--list-presets",
        ),
        "evaluate": (
            "--preset",
            "--config",
            "--set",
            "--reward",
            "--model",
            "--prompts",
            "--images",
            "--images-per-prompt",
            "--scale",
            "--seed",
            "--batch-size",
            "--output",
            "--overwrite",
            "--json",
        ),
        "soup": (
            "--coef",
            "--method",
            "--rank",
            "--density",
            "--seed",
            "--allow-missing",
            "--sweep",
            "--reward",
            "--model",
            "--set",
            "--images",
            "--output",
            "--overwrite",
            "--json",
        ),
        "score": (
            "--reward",
            "--set",
            "--prompt",
            "--prompts",
            "--format",
            "--output",
            "--overwrite",
            "--resume",
            "--top",
            "--gallery",
            "--strict",
            "--workers",
            "--json",
        ),
    }.get(command, ("--help", "--version", "--nosuch"))
    switches = {
        "--json",
        "--quiet",
        "--list-presets",
        "--overwrite",
        "--allow-missing",
        "--resume",
        "--gallery",
        "--strict",
        "--help",
        "--version",
    } - ({"--resume"} if command == "train" else set())
    good = (
        "1",
        "2",
        "0.5",
        "0,1",
        "0:1:0.5",
        "clip",
        "brightness",
        "run",
        "base",
        "tiny",
        "shapes",
        "file.txt",
        "12GB",
        "csv",
        "exact",
        "o.csv",
        "o",
        "train.steps=2",
        "-1",
        "1e999",
        "99999999999999999999",
    )
    parts = []
    for _ in range(rng.choice((1, 2, 3))):
        flag = rng.choice(names)
        known = flag in names and rng.random() < 0.97
        flag = flag if known else strange.damage(flag.encode(), rng).decode("utf-8", "replace")
        if flag in switches:
            parts.append(flag)
            continue
        text = rng.choice(
            (rng.choice(strange.TEXTS), rng.choice(good), str(rng.choice(strange.NUMBERS)))
        )
        # Numbers of processes and of mixes are obeyed, and are not what is tried here.
        if flag in ("--workers", "--images", "--sweep") and text[:1].isdigit():
            text = "1" if flag != "--sweep" else "0:1:1"
        parts.append(_argument(f"{flag}={text}"))
    targets = {
        "train": rng.choice((["--dry-run"], ["--show-preset"], ["--dry-run", "--preset=tiny"])),
        "evaluate": [
            rng.choice(
                (
                    "run",
                    "base",
                    "file.txt",
                    "nosuch",
                    "run/checkpoints/step-000001",
                    rng.choice(strange.TEXTS),
                )
            )
        ],
        "soup": [
            "run",
            rng.choice(("base", "run", "run=0.5", "base=nan", "=", rng.choice(strange.TEXTS))),
        ],
        "score": [
            rng.choice(
                (
                    "pictures",
                    "pictures/0.png",
                    "file.txt",
                    "pic*/*.png",
                    "-",
                    rng.choice(strange.TEXTS),
                )
            )
        ],
    }.get(command, [])
    # What would take long without being strange comes last, and wins.
    ending = {"evaluate": list(SMALL) if rng.random() < 0.95 else [], "soup": ["--images=1"]}.get(
        command, []
    )
    if command == "evaluate" and rng.random() < 0.6:
        # Most end at the first check; the others would sample.
        targets = [*targets, "nosuch-either"]
    del run
    return [_argument(command), *map(_argument, targets), *parts, *ending]


DOMAINS: dict[str, tuple[Domain, float]] = {
    "configs": (configs, 0.17),
    "assignments": (assignments, 0.17),
    "prompts": (prompts, 0.07),
    "loras": (loras, 0.17),
    "images": (images, 0.11),
    "texts": (texts, 0.11),
    "rows": (rows, 0.08),
    "runs": (runs, 0.05),
    "flags": (flags, 0.07),
}
"""Each domain with its share of all inputs."""
