"""What the inputs are made from: a run, LoRAs of several formats, images of several formats."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from tests.warm import Warm

QUICK = (
    "--set=sample.num_inference_steps=2",
    "--set=gradient.k_max=1",
    "--set=train.batch_size=2",
    "--set=train.micro_batch=2",
    "--set=train.rollout_batch=2",
    "--set=train.decode_batch=2",
    "--set=train.compile=false",
    "--set=eval.images=1",
    "--set=eval.sample_images=1",
    "--set=eval.every=0",
    "--set=lora.rank=2",
    "--set=lora.target_modules=[to_q]",
)
"""Settings with which the embedded model trains a step in the least time."""

GRAPH = {
    "3": {
        "class_type": "KSampler",
        "inputs": {"positive": ["6", 0], "negative": ["7", 0], "seed": 5, "model": ["4", 0]},
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x.safetensors"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red circle", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "ugly", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
}
INFOTEXT = (
    "a red circle, <lora:x:0.8>\nNegative prompt: ugly\n"
    "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64"
)


@dataclass(frozen=True)
class Assets:
    """Folders and files; they are copied, never changed.

    Args:
        run: A finished run of two steps, with a checkpoint of each.
        loras: LoRA files, and PEFT's folder, by their format.
        images: Images in the formats of Pillow, by name.
        rows: Rows of `score` on `pictures`, by their format.
        pictures: The folder of the rows.
    """

    run: Path
    loras: dict[str, Path]
    images: dict[str, bytes]
    rows: dict[str, bytes]
    pictures: Path


def make(warm: Warm, folder: Path) -> Assets:
    """Make everything in a new folder."""
    folder.mkdir(parents=True)
    train = ("train", "--preset=tiny", "--steps=2", "--set=output.save_every=1", "--output=run")
    done = warm.run(*train, *QUICK, cwd=folder)
    assert done.code == 0, done.err
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(4):
        pixels = np.full((8, 8, 3), 40 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    rows = {}
    for suffix in ("csv", "jsonl", "parquet"):
        scored = ("score", "pictures", "--reward=brightness", f"--output=rows.{suffix}", "-q")
        assert warm.run(*scored, cwd=folder).code == 0
        rows[suffix] = (folder / f"rows.{suffix}").read_bytes()
    return Assets(folder / "run", _loras(folder), _images(), rows, pictures)


def _loras(folder: Path) -> dict[str, Path]:
    ours = folder / "run" / "checkpoints" / "step-000002" / "pytorch_lora_weights.safetensors"
    state = load_file(ours)
    found = {"ours": ours}
    place = folder / "loras"
    place.mkdir()
    # Of the same tensors: only how they are called differs.
    plain = place / "plain.safetensors"
    save_file(state, plain)
    kohya, peft = {}, {}
    for name, tensor in state.items():
        layer = name.removeprefix("unet.")
        half = "down" if ".down." in layer or "lora_A" in layer else "up"
        layer = layer.partition(".lora")[0]
        kohya[f"lora_unet_{layer.replace('.', '_')}.lora_{half}.weight"] = tensor
        letter = {"down": "A", "up": "B"}[half]
        peft[f"base_model.model.{layer}.lora_{letter}.weight"] = tensor
    save_file(kohya, place / "kohya.safetensors")
    (place / "peft").mkdir()
    save_file(peft, place / "peft" / "adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q"], "peft_type": "LORA"}
    (place / "peft" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    found |= {"plain": plain, "kohya": place / "kohya.safetensors", "peft": place / "peft"}
    return found


def _images() -> dict[str, bytes]:
    base = Image.fromarray(
        np.arange(3 * 24 * 20, dtype=np.uint32).astype(np.uint8).reshape(24, 20, 3)
    )
    texts = PngInfo()
    texts.add_text("prompt", json.dumps(GRAPH))
    texts.add_text("parameters", INFOTEXT)
    texts.add_itxt("prompt", "a blue square")
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + INFOTEXT.encode("utf-16-be")
    wanted = {
        "rgb.png": (base, "PNG", {"pnginfo": texts, "exif": exif}),
        "palette.png": (base.convert("P"), "PNG", {"transparency": 3}),
        "grey16.png": (Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)), "PNG", {}),
        "rgba.png": (base.convert("RGBA"), "PNG", {}),
        "plain.jpg": (base, "JPEG", {"exif": exif}),
        "progressive.jpg": (base, "JPEG", {"progressive": True}),
        "cmyk.jpg": (base.convert("CMYK"), "JPEG", {}),
        "lossy.webp": (base, "WEBP", {"exif": exif}),
        "lossless.webp": (base.convert("RGBA"), "WEBP", {"lossless": True}),
        "plain.bmp": (base, "BMP", {}),
        "plain.tif": (base, "TIFF", {}),
        "lzw.tif": (base, "TIFF", {"compression": "tiff_lzw"}),
        "float.tif": (base.convert("F"), "TIFF", {}),
        "plain.gif": (base, "GIF", {}),
        "animated.gif": (base, "GIF", {"save_all": True, "append_images": [base.rotate(90)]}),
        "animated.webp": (base, "WEBP", {"save_all": True, "append_images": [base.rotate(90)]}),
        "plain.ppm": (base, "PPM", {}),
        "plain.ico": (base, "ICO", {}),
        "plain.tga": (base, "TGA", {}),
        "plain.avif": (base, "AVIF", {}),
    }
    found: dict[str, bytes] = {}
    for name, (image, kind, options) in wanted.items():
        data = io.BytesIO()
        try:
            image.save(data, kind, **options)
        except (KeyError, OSError):
            continue  # this Pillow cannot write it
        found[name] = data.getvalue()
    return found


def copy_run(assets: Assets, place: Path) -> Path:
    """Return a copy of the run."""
    shutil.copytree(assets.run, place / "run")
    return place / "run"
