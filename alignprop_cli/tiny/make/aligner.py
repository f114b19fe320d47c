"""Stage three of the embedded model: the image-text model, used as the alignment reward.

It learns to tell the prompt of an image from prompts that differ in one word: on drawings, on
blurred, noisy and autoencoded drawings, and on images of the network. Of the last the checker says
what they show, and what was asked for is among the wrong prompts. Without them it tells a triangle
from a star in a drawing but hardly in an image that is neither quite.
The temperature is fixed and high: cosines of right and wrong prompts end far apart, which leaves
the reward room to rise.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from alignprop_cli.tiny import language as data
from alignprop_cli.tiny.checker import look
from alignprop_cli.tiny.language import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene
from alignprop_cli.tiny.make import tokenizer

BATCH = 64
LEARNING_RATE = 1.5e-3
TEMPERATURE = 14.0
"""Fixed factor on the cosines in the loss."""
PICTURES = 24_000
AUTOENCODED = 6_000
GENERATED = 6_000
_DRAWING_STEPS = 8

CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": data.SIZE_PX,
            "patch_size": 6,
            "width": 96,
            "head_width": 24,
            "layers": 4,
        },
        "text_cfg": {
            "context_length": tokenizer.MAX_LENGTH,
            "vocab_size": 275,
            "width": 96,
            "heads": 4,
            "layers": 2,
            "hf_tokenizer_name": "beside this file",
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
}


def neighbours(scene: Scene) -> dict[str, list[Scene]]:
    """Return, for each attribute, all scenes that differ in that attribute alone."""
    choices = {
        "count": (1, 2, 3, 4),
        "size": tuple(SIZES),
        "colour": tuple(COLOURS),
        "shape": SHAPES,
        "background": tuple(BACKGROUNDS),
    }
    have = vars(scene)
    return {
        name: [Scene(**{**have, name: value}) for value in values if value != have[name]]
        for name, values in choices.items()
    }


def save(model: torch.nn.Module, directory: Path) -> None:
    """Write a folder that open_clip loads as local-dir:DIRECTORY, weights in float16."""
    tokenizer.save(directory)
    (directory / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(state, directory / "open_clip_model.safetensors", metadata={"format": "pt"})


def new_model() -> open_clip.CLIP:
    """Return an untrained model of 0.7 M parameters."""
    settings = CONFIG["model_cfg"]
    text = {k: v for k, v in settings["text_cfg"].items() if k != "hf_tokenizer_name"}
    return open_clip.CLIP(settings["embed_dim"], settings["vision_cfg"], text)


@torch.no_grad()
def autoencoded(
    pipeline: StableDiffusionPipeline, pictures: data.Pixels, device: torch.device
) -> Tensor:
    """Return drawings after the autoencoder with noise on the latents, (N, 3, 48, 48), uint8."""
    vae = pipeline.vae
    generator = torch.Generator().manual_seed(6)
    parts: list[Tensor] = []
    for start in range(0, len(pictures), 200):
        batch = torch.from_numpy(pictures[start : start + 200]).permute(0, 3, 1, 2)
        latents = vae.encode(batch.to(device).float() / 127.5 - 1.0).latent_dist.mode()
        spread = torch.rand(len(latents), 1, 1, 1, generator=generator) * 0.5
        latents += (spread * torch.randn(latents.shape, generator=generator)).to(device)
        decoded = vae.decode(latents, return_dict=False)[0].clamp(-1.0, 1.0)
        parts.append(((decoded + 1.0) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(parts)


def generated(pipeline: StableDiffusionPipeline, work: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Sample training prompts from the network and read the images with the checker.

    The checker does not read sizes: the size that was asked for is taken as seen. Images of
    nothing, of more than four objects, or of a scene that is held out are left out.

    Returns:
        Images, shape (N, 3, 48, 48), uint8; the numbers of the prompts seen and of the prompts
        asked for, each (N,). Kept in a file.
    """
    file = work / "generated.pt"
    if file.is_file():
        kept = torch.load(file, weights_only=True)
        return kept["pictures"], kept["seen"], kept["asked"]
    prompts = data.train_prompts()
    number = {prompt: i for i, prompt in enumerate(prompts)}
    rng = np.random.default_rng(7)
    parts: list[np.ndarray] = []
    seen, asked = [], []
    for start in range(0, GENERATED, 50):
        chosen = [int(i) for i in rng.integers(len(prompts), size=50)]
        images = pipeline(
            [prompts[i] for i in chosen],
            num_inference_steps=_DRAWING_STEPS,
            # Weak guidance draws more of what is wrong, strong guidance more of what is right.
            guidance_scale=float(rng.uniform(1.5, 4.0)),
            generator=torch.Generator().manual_seed(start),
            output_type="np",
        ).images
        pictures = np.rint(images * 255.0).astype(np.uint8)
        for i, picture in zip(chosen, pictures, strict=True):
            read = look(picture)
            if not 1 <= read.count <= 4:
                continue
            size = data.parse(prompts[i]).size
            scene = Scene(read.count, size, read.colour, read.shape, read.background)
            if scene.prompt in number:
                parts.append(picture)
                seen.append(number[scene.prompt])
                asked.append(i)
    kept = {
        "pictures": torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2).contiguous(),
        "seen": torch.tensor(seen),
        "asked": torch.tensor(asked),
    }
    torch.save(kept, file)
    return kept["pictures"], kept["seen"], kept["asked"]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, shift and add noise to images (B, 3, H, W) in [0, 1], differently for each."""
    blurred = gaussian_blur(images, [5, 5], [0.3 + float(torch.rand((), generator=generator))])
    share = torch.rand(len(images), 1, 1, 1, generator=generator)
    images = images + share * (blurred - images)
    spread = 0.08 * torch.rand(len(images), 1, 1, 1, generator=generator) ** 2
    shade = 0.05 * torch.randn(len(images), 3, 1, 1, generator=generator)
    return images + shade + spread * torch.randn(images.shape, generator=generator)


def train(
    pipeline: StableDiffusionPipeline, work: Path, device: torch.device, steps: int
) -> open_clip.CLIP:
    """Train to `steps`, going on from the last kept state."""
    torch.manual_seed(5)
    model = new_model().to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02
    )
    step, kept = 0, work / "aligner.pt"
    if kept.is_file():
        state = torch.load(kept, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    prompts = data.train_prompts()
    drawn, chosen = data.draw_many(prompts, PICTURES, seed=5)
    coded = autoencoded(pipeline, drawn[:AUTOENCODED], device)
    own, seen, asked = generated(pipeline, work)
    pictures = torch.cat([torch.from_numpy(drawn).permute(0, 3, 1, 2), coded, own])
    numbers = np.concatenate([chosen, chosen[:AUTOENCODED], seen.numpy()])
    wrong = np.concatenate([chosen, chosen[:AUTOENCODED], asked.numpy()])
    # Half of a batch is the network's, a quarter drawings, a quarter autoencoded drawings.
    sources = [(0, PICTURES, 4), (PICTURES, len(pictures) - len(own), 4)]
    sources.append((len(pictures) - len(own), len(pictures), 2))
    tokens = open_tokens(work, prompts)
    close = _close(prompts)
    started, losses = time.perf_counter(), []
    while step < steps:
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = LEARNING_RATE * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        generator = torch.Generator().manual_seed(step)
        pick = torch.cat(
            [
                torch.randint(first, last, (BATCH // share,), generator=generator)
                for first, last, share in sources
            ]
        )
        images = augment(pictures[pick].float() / 255.0, generator).to(device)
        chosen_now, wrong_now = numbers[pick.numpy()], wrong[pick.numpy()]
        texts, target = _candidates(chosen_now, wrong_now, close, step)
        visual = model.encode_image((images - 0.5) / 0.25, normalize=True)
        textual = model.encode_text(tokens[texts].to(device), normalize=True)
        loss = torch.nn.functional.cross_entropy(
            TEMPERATURE * visual @ textual.T, target.to(device)
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        step += 1
        if step % 100 == 0:
            seconds = time.perf_counter() - started
            print(
                f"aligner step {step} loss {np.mean(losses[-100:]):.4f} {seconds:.0f} s", flush=True
            )
        if step % 500 == 0 or step == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, kept)
            print(f"aligner step {step} ranks {figures(model, work, 300)}", flush=True)
    return model.eval()


def open_tokens(work: Path, prompts: list[str]) -> Tensor:
    """Return token numbers, shape (prompts, MAX_LENGTH), as the saved tokenizer makes them."""
    made = tokenizer.save(work / "tokenizer")
    return made(
        prompts, padding="max_length", max_length=tokenizer.MAX_LENGTH, return_tensors="pt"
    ).input_ids


def _close(prompts: list[str]) -> list[list[list[int]]]:
    """Return, for each prompt and attribute, the numbers of the prompts that differ in it alone."""
    number = {prompt: i for i, prompt in enumerate(prompts)}
    result: list[list[list[int]]] = []
    for prompt in prompts:
        near = neighbours(data.parse(prompt)).values()
        result.append([[number[s.prompt] for s in group if s.prompt in number] for group in near])
    return result


def _candidates(
    numbers: np.ndarray, wrong: np.ndarray, close: list[list[list[int]]], step: int
) -> tuple[Tensor, Tensor]:
    """Return the numbers of the texts to choose from, and which of them is each image's.

    Each image brings its own text, what was asked for instead, and one neighbour by attribute.
    """
    rng = np.random.default_rng(step)
    texts = {int(n) for n in numbers} | {int(n) for n in wrong}
    for number in numbers:
        texts |= {int(rng.choice(group)) for group in close[number] if group}
    ordered = sorted(texts)
    place = {n: i for i, n in enumerate(ordered)}
    return torch.tensor(ordered), torch.tensor([place[int(n)] for n in numbers])


@torch.no_grad()
def figures(model: open_clip.CLIP, work: Path, count: int) -> dict[str, float]:
    """Return how often the true prompt ranks first, on drawings of held-out prompts.

    `all`: among 15 others that differ in one attribute, at least 3 for every attribute that has so
    many values (there is one other size); the rest: among those of one attribute alone.
    `right` and `wrong` are mean cosines of true prompts and of those others.
    """
    device = next(model.parameters()).device
    heldout = data.heldout_prompts()
    drawn, chosen = data.draw_many(heldout, count, seed=8)
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).to(device).float() / 255.0
    visual = model.encode_image((images - 0.5) / 0.25, normalize=True)
    right: dict[str, list[bool]] = {}
    true_cosines, wrong_cosines = [], []
    rng = np.random.default_rng(0)
    for feature, number in zip(visual, chosen, strict=True):
        groups = neighbours(data.parse(heldout[number]))
        picked = {name: list(scenes) for name, scenes in groups.items()}
        picked["colour"] = [picked["colour"][i] for i in rng.permutation(5)[:4]]
        flat = [(name, scene.prompt) for name, scenes in picked.items() for scene in scenes]
        texts = open_tokens(work, [heldout[number], *(prompt for _, prompt in flat)])
        cosines = model.encode_text(texts.to(device), normalize=True) @ feature
        for name in ("all", *groups):
            others = [i + 1 for i, (group, _) in enumerate(flat) if name in ("all", group)]
            right.setdefault(name, []).append(bool(cosines[0] > cosines[others].max()))
        true_cosines.append(float(cosines[0]))
        wrong_cosines.append(float(cosines[1:].mean()))
    result = {name: round(float(np.mean(values)), 3) for name, values in right.items()}
    return result | {
        "right": round(float(np.mean(true_cosines)), 3),
        "wrong": round(float(np.mean(wrong_cosines)), 3),
    }
