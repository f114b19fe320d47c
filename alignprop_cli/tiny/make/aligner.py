"""Stage three of the embedded model: the image-text model, used as the alignment reward.

It learns to tell the prompt of an image from prompts that differ in one word. It sees drawings,
drawings after the autoencoder, and images that the UNet generated, all blurred and with noise. What
a generated image shows is read by the checker, and the prompt that it was generated from is among
the wrong ones. Without generated images the model tells a triangle from a star in a drawing, but
hardly in an image that is something in between.

The temperature is fixed and high, so that the cosines of right and wrong prompts end far apart.
This leaves the reward room to rise.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

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
from alignprop_cli.tiny.make import checkpoint, tokenizer

BATCH = 64
LEARNING_RATE = 1.5e-3
TEMPERATURE = 14.0
"""Fixed factor on the cosines in the loss."""
DRAWINGS = 24_000
AUTOENCODED = 6_000
"""How many of the drawings are used a second time, after the autoencoder."""
GENERATED = 6_000
"""Images that are generated; those that show no scene of the language are left out."""
# Few steps are cheap, and the mistakes that come with them are welcome here.
_SAMPLING_STEPS = 8
# Drawings or samples at a time, which bounds the memory.
_ENCODED_AT_A_TIME = 200
_SAMPLED_AT_A_TIME = 50

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
            "vocab_size": 275,  # all tokens of tokenizer.py
            "width": 96,
            "heads": 4,
            "layers": 2,
            # Any name makes open_clip use a tokenizer of transformers: the one in the folder.
            "hf_tokenizer_name": "in this folder",
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


def save(model: torch.nn.Module, directory: Path, config: dict[str, Any] = CONFIG) -> None:
    """Write a folder that open_clip loads as local-dir:DIRECTORY, weights in float16."""
    tokenizer.save(directory)
    (directory / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {
        # All but the counters of batch norms.
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(state, directory / "open_clip_model.safetensors", metadata={"format": "pt"})


def new_model(config: dict[str, Any] = CONFIG) -> open_clip.CLIP:
    """Return an untrained model, of 0.7 M parameters by default."""
    settings = config["model_cfg"]
    text = {k: v for k, v in settings["text_cfg"].items() if k != "hf_tokenizer_name"}
    return open_clip.CLIP(settings["embed_dim"], settings["vision_cfg"], text)


@torch.no_grad()
def autoencoded(
    pipeline: StableDiffusionPipeline, drawings: data.Pixels, device: torch.device
) -> Tensor:
    """Return drawings after the autoencoder, with noise on the latents, (N, 3, 48, 48), uint8."""
    # The amount of noise differs between drawings, up to half the standard deviation of latents.
    vae = pipeline.vae
    generator = torch.Generator().manual_seed(6)
    parts: list[Tensor] = []
    for start in range(0, len(drawings), _ENCODED_AT_A_TIME):
        batch = torch.from_numpy(drawings[start : start + _ENCODED_AT_A_TIME])
        batch = batch.permute(0, 3, 1, 2)  # (B, 3, 48, 48)
        latents = vae.encode(batch.to(device).float() / 127.5 - 1.0).latent_dist.mode()
        spread = torch.rand(len(latents), 1, 1, 1, generator=generator) * 0.5
        latents += (spread * torch.randn(latents.shape, generator=generator)).to(device)
        decoded = vae.decode(latents, return_dict=False)[0].clamp(-1.0, 1.0)
        parts.append(((decoded + 1.0) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(parts)


def generated(pipeline: StableDiffusionPipeline, work: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Sample images of training prompts; see `seen`."""
    return seen(lambda: _samples(pipeline), work / "generated.pt")


def _samples(pipeline: StableDiffusionPipeline) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Yield batches of images (B, 48, 48, 3), uint8, and of their prompts."""
    prompts = data.train_prompts()
    rng = np.random.default_rng(7)
    for start in range(0, GENERATED, _SAMPLED_AT_A_TIME):
        chosen = [prompts[int(i)] for i in rng.integers(len(prompts), size=_SAMPLED_AT_A_TIME)]
        sampled = pipeline(
            chosen,
            num_inference_steps=_SAMPLING_STEPS,
            # Weak guidance gives more wrong images, strong guidance more right ones.
            guidance_scale=float(rng.uniform(1.5, 4.0)),
            generator=torch.Generator().manual_seed(start),
            output_type="np",
        ).images
        yield np.rint(sampled * 255.0).astype(np.uint8), chosen


def seen(
    batches: Callable[[], Iterable[tuple[np.ndarray, list[str]]]], file: Path
) -> tuple[Tensor, Tensor, Tensor]:
    """Read with the checker what generated images of training prompts show.

    Images without objects, with more than four, or of a scene that is held out are left out.

    Args:
        batches: Samples images (B, 48, 48, 3), uint8, with their prompts.
        file: Where the result is cached.

    Returns:
        Images, shape (N, 3, 48, 48), uint8; the numbers of the prompts that they show and of the
        prompts that they were sampled from, each (N,).
    """
    if file.is_file():
        kept = torch.load(file, weights_only=True)
        return kept["images"], kept["seen"], kept["asked"]
    number = {prompt: i for i, prompt in enumerate(data.train_prompts())}
    parts: list[np.ndarray] = []
    shown, asked = [], []
    for images, prompts in batches():
        for image, prompt in zip(images, prompts, strict=True):
            text = shown_prompt(image, prompt)
            if text in number:
                parts.append(image)
                shown.append(number[text])
                asked.append(number[prompt])
    kept = {
        "images": torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2).contiguous(),
        "seen": torch.tensor(shown),
        "asked": torch.tensor(asked),
    }
    torch.save(kept, file)
    return kept["images"], kept["seen"], kept["asked"]


def shown_prompt(image: np.ndarray, asked: str) -> str:
    """Return the prompt of what the checker sees in an image, with the size that was asked for.

    The checker does not read sizes. Without objects, or with more than four, the text is empty.
    """
    read = look(image)
    if not 1 <= read.count <= 4:
        return ""
    size = data.parse(asked).size
    return Scene(read.count, size, read.colour, read.shape, read.background).prompt


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur images (B, 3, H, W) in [0, 1], change their colours a little and add noise.

    Each by a different amount, so that the model also reads images that are less clean than
    drawings.
    """
    # One blur for the batch, mixed in by another share for each image, which is much faster.
    blurred = gaussian_blur(images, [5, 5], [0.3 + float(torch.rand((), generator=generator))])
    share = torch.rand(len(images), 1, 1, 1, generator=generator)
    images = images + share * (blurred - images)
    # Squared, so that most images get little noise.
    spread = 0.08 * torch.rand(len(images), 1, 1, 1, generator=generator) ** 2
    shade = 0.05 * torch.randn(len(images), 3, 1, 1, generator=generator)
    return images + shade + spread * torch.randn(images.shape, generator=generator)


def train(
    pipeline: StableDiffusionPipeline, work: Path, device: torch.device, steps: int
) -> open_clip.CLIP:
    """Train to `steps`, resuming from the last saved state."""
    # 1. The model and its optimizer.
    torch.manual_seed(5)
    model = new_model().to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02
    )
    state = {"model": model, "optimizer": optimizer}
    step = checkpoint.restore(work / "aligner.pt", device, **state)
    # 2. All images and texts.
    prompts = data.train_prompts()
    everything, numbers, wrong = _all_images(pipeline, work, device)
    # First image, end, and one part in how many of a batch: a quarter are drawings, a quarter
    # autoencoded drawings, and half generated images.
    coded = DRAWINGS + AUTOENCODED
    sources = [(0, DRAWINGS, 4), (DRAWINGS, coded, 4), (coded, len(everything), 2)]
    tokens = open_tokens(work, prompts)
    close = close_prompts(prompts)
    started, losses = time.perf_counter(), []
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        # 3. A batch, as a function of the step, so that a resumed run sees the same batches.
        generator = torch.Generator().manual_seed(step)
        pick = torch.cat(
            [
                torch.randint(first, last, (BATCH // share,), generator=generator)
                for first, last, share in sources
            ]
        )
        images = augment(everything[pick].float() / 255.0, generator).to(device)
        chosen_now, wrong_now = numbers[pick.numpy()], wrong[pick.numpy()]
        texts, target = candidates(chosen_now, wrong_now, close, step)
        # 4. The loss of CLIP from images to texts, with texts that differ in one word.
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
            checkpoint.save(work / "aligner.pt", step, **state)
            print(f"aligner step {step} ranks {measure(model, work, 300)}", flush=True)
    return model.eval()


def _all_images(
    pipeline: StableDiffusionPipeline, work: Path, device: torch.device
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Return drawings, then autoencoded drawings, then generated images, (N, 3, 48, 48), uint8.

    Also for each the number of the prompt that it shows, and of the prompt that it was made from;
    these differ for generated images alone.
    """
    drawings, chosen = data.draw_many(data.train_prompts(), DRAWINGS, seed=5)
    coded = autoencoded(pipeline, drawings[:AUTOENCODED], device)
    samples, shown, asked = generated(pipeline, work)
    return (
        torch.cat([torch.from_numpy(drawings).permute(0, 3, 1, 2), coded, samples]),
        np.concatenate([chosen, chosen[:AUTOENCODED], shown.numpy()]),
        np.concatenate([chosen, chosen[:AUTOENCODED], asked.numpy()]),
    )


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: it rises over 100 steps, then falls to zero as a half cosine."""
    warm = min(1.0, (step + 1) / 100)
    return LEARNING_RATE * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def open_tokens(work: Path, prompts: list[str]) -> Tensor:
    """Return token numbers, shape (prompts, MAX_LENGTH), as the saved tokenizer makes them."""
    made = tokenizer.save(work / "tokenizer")
    return made(
        prompts, padding="max_length", max_length=tokenizer.MAX_LENGTH, return_tensors="pt"
    ).input_ids


def close_prompts(prompts: list[str]) -> list[list[list[int]]]:
    """Return, for each prompt and attribute, the numbers of the prompts that differ in it alone."""
    number = {prompt: i for i, prompt in enumerate(prompts)}
    result: list[list[list[int]]] = []
    for prompt in prompts:
        near = neighbours(data.parse(prompt)).values()
        result.append([[number[s.prompt] for s in group if s.prompt in number] for group in near])
    return result


def candidates(
    numbers: np.ndarray, wrong: np.ndarray, close: list[list[list[int]]], step: int
) -> tuple[Tensor, Tensor]:
    """Return the numbers of the texts of a batch, and for each image which of them is its own.

    For each image the texts contain its own, the prompt that it was generated from, and for each
    attribute one that differs in that attribute alone.
    """
    # All images of a batch share the texts, and each text is there once: twice, it would be right
    # and wrong for the same image.
    rng = np.random.default_rng(step)
    texts = {int(n) for n in numbers} | {int(n) for n in wrong}
    for number in numbers:
        texts |= {int(rng.choice(group)) for group in close[number] if group}
    ordered = sorted(texts)
    place = {n: i for i, n in enumerate(ordered)}
    return torch.tensor(ordered), torch.tensor([place[int(n)] for n in numbers])


@torch.no_grad()
def measure(model: open_clip.CLIP, work: Path, count: int) -> dict[str, float]:
    """Return how often the true prompt ranks first, on drawings of held-out prompts.

    For an attribute: among the prompts that differ in it alone. For `all`: among all of these, 15
    others (3 counts, 1 size, 4 of 5 colours, 3 shapes, 4 backgrounds). `right` and `wrong` are the
    mean cosines of true prompts and of these others.
    """
    device = next(model.parameters()).device
    heldout = data.heldout_prompts()
    drawings, chosen = data.draw_many(heldout, count, seed=8)
    images = torch.from_numpy(drawings).permute(0, 3, 1, 2).to(device).float() / 255.0
    visual = model.encode_image((images - 0.5) / 0.25, normalize=True)  # (count, 64)
    right: dict[str, list[bool]] = {}
    true_cosines, wrong_cosines = [], []
    rng = np.random.default_rng(0)
    for feature, number in zip(visual, chosen, strict=True):
        # The true prompt is the first text, the others follow with the attribute they differ in.
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
