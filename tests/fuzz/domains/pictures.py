"""What is scored: image files, the texts inside and beside them, rows of an earlier run."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import zlib
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import strange
from tests.fuzz.assets import GRAPH, INFOTEXT, Assets


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
