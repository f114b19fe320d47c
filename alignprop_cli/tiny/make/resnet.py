"""Stage six of the embedded models: a second image-text model, for images of the few-step flow.

The aligner of stage three is a small ViT and saw drawings and images of the UNet. This one has the
same text tower, frozen, and a ResNet that reads images at twice the resolution, trained for the
most part on images of the few-step flow, by the same rule: what the checker sees in an image is its
prompt, and the one that it was sampled from is among the wrong ones. Two networks that see with
different means are hard to please by anything but what both were taught to see.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate, pad

from alignprop_cli.models.padding import CountedPadding
from alignprop_cli.models.sd3 import T5_LENGTH
from alignprop_cli.tiny import language as data
from alignprop_cli.tiny.make import aligner, checkpoint
from alignprop_cli.tiny.make.fewstep import few_calls
from alignprop_cli.tiny.make.flow import short

IMAGE_SIZE = 96
"""Side in pixels that images are enlarged to: the first layers of a ResNet divide it by four."""
DRAWINGS = 12_000
AUTOENCODED = 4_000
"""How many of the drawings are used a second time, after the autoencoder."""
GENERATED = 27_648
"""Images of the few-step flow."""
MOST_SHIFT = 3
"""Pixels by which images are moved, at most."""
_SAMPLED_AT_A_TIME = 64

CONFIG = {
    "model_cfg": {
        **aligner.CONFIG["model_cfg"],
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "layers": [1, 1, 2, 2],  # a list makes it open_clip's ResNet
            "width": 16,
            "head_width": 32,
        },
    },
    "preprocess_cfg": aligner.CONFIG["preprocess_cfg"],
}


def new_model(first: open_clip.CLIP) -> open_clip.CLIP:
    """Return an untrained ResNet of 1.7 M parameters beside the frozen text tower of another."""
    torch.manual_seed(5)
    model = aligner.new_model(CONFIG)
    model.load_state_dict(
        {name: v for name, v in first.state_dict().items() if not name.startswith("visual.")},
        strict=False,
    )
    model.requires_grad_(False).visual.requires_grad_(True)
    return model


def samples(
    pipeline: StableDiffusion3Pipeline, prompts: list[str], count: int, seed: int
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Yield batches of images (B, 48, 48, 3), uint8, of the few-step flow, and of their prompts."""
    pipeline.transformer.set_attn_processor(CountedPadding(T5_LENGTH))
    sample = few_calls(short(pipeline))
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, _SAMPLED_AT_A_TIME):
        size = min(_SAMPLED_AT_A_TIME, count - start)
        chosen = [prompts[int(i)] for i in rng.integers(len(prompts), size=size)]
        images = sample(chosen, guidance_scale=0.0, generator=generator, output_type="np").images
        if start % (32 * _SAMPLED_AT_A_TIME) == 0:
            print(f"resnet image {start} of {count}", flush=True)
        yield np.rint(images * 255.0).astype(np.uint8), chosen


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (B, 3, H, W) blurred, shaded and noisy, some mirrored, all moved alike."""
    images = aligner.augment(images, generator)
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    x, y = torch.randint(0, 2 * MOST_SHIFT + 1, (2,), generator=generator).tolist()
    height, width = images.shape[-2:]
    padded = pad(images, [MOST_SHIFT] * 4, mode="replicate")
    return padded[:, :, y : y + height, x : x + width]


def features(model: open_clip.CLIP, images: Tensor) -> Tensor:
    """Return the features of images (B, 3, 48, 48) in [0, 1], of unit length."""
    size = model.visual.image_size  # (96, 96); that of stage three reads them as they are
    images = (images - 0.5) / 0.25
    if size != images.shape[-2:]:
        images = interpolate(images, size=size, mode="bicubic", align_corners=False)
    return model.encode_image(images, normalize=True)


def train(
    first: open_clip.CLIP,
    pipeline: StableDiffusion3Pipeline,
    work: Path,
    device: torch.device,
    steps: int,
) -> open_clip.CLIP:
    """Train to `steps`, resuming from the last saved state.

    Args:
        first: The model of stage three.
        pipeline: The few-step flow.
        work: Where states and images are kept.
        device: Where to train.
        steps: Batches of `aligner.BATCH` images.
    """
    # 1. The model and its optimizer.
    model = new_model(first).to(device)
    weights = list(model.visual.parameters())
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=0.05)
    state = {"model": model, "optimizer": optimizer}
    step = checkpoint.restore(work / "resnet.pt", device, **state)
    # 2. All images, and the features of all prompts.
    everything, numbers, wrong = _all_images(pipeline, work, device)
    coded = DRAWINGS + AUTOENCODED
    # First image, end, and how many eighths of a batch.
    sources = [(0, DRAWINGS, 1), (DRAWINGS, coded, 1), (coded, len(everything), 6)]
    eighth = aligner.BATCH // 8
    prompts = data.train_prompts()
    texts_of = _texts(model, work, prompts, device)
    close = aligner.close_prompts(prompts)
    started, losses = time.perf_counter(), []
    model.train()
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = aligner.learning_rate(step, steps)
        # 3. A batch, as a function of the step, so that a resumed run sees the same batches.
        generator = torch.Generator().manual_seed(step)
        pick = torch.cat(
            [torch.randint(a, b, (n * eighth,), generator=generator) for a, b, n in sources]
        )
        images = moved(everything[pick].float() / 255.0, generator).to(device)
        chosen = numbers[pick.numpy()], wrong[pick.numpy()]
        texts, target = aligner.candidates(*chosen, close, step)
        # 4. The loss of CLIP from images to texts.
        cosines = features(model, images) @ texts_of[texts].T
        loss = cross_entropy(aligner.TEMPERATURE * cosines, target.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        step += 1
        if step % 100 == 0:
            said = f"loss {np.mean(losses[-100:]):.4f} {time.perf_counter() - started:.0f} s"
            print(f"resnet step {step} {said}", flush=True)
        if step % 500 == 0 or step == steps:
            checkpoint.save(work / "resnet.pt", step, **state)
    return model.eval()


def _all_images(
    pipeline: StableDiffusion3Pipeline, work: Path, device: torch.device
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Return images, and the numbers of what they show and were made from, as the aligner's."""
    batches = functools.partial(samples, pipeline, data.train_prompts(), GENERATED, seed=4)
    images, shown, asked = aligner.seen(batches, work / "few.pt")
    drawings, chosen = data.draw_many(data.train_prompts(), DRAWINGS, seed=5)
    coded = aligner.autoencoded(pipeline, drawings[:AUTOENCODED], device)
    return (
        torch.cat([torch.from_numpy(drawings).permute(0, 3, 1, 2), coded, images]),
        np.concatenate([chosen, chosen[:AUTOENCODED], shown.numpy()]),
        np.concatenate([chosen, chosen[:AUTOENCODED], asked.numpy()]),
    )


@torch.no_grad()
def _texts(model: open_clip.CLIP, work: Path, prompts: list[str], device: torch.device) -> Tensor:
    """Return the features of prompts, (N, 64), of unit length."""
    tokens = aligner.open_tokens(work, prompts).to(device)
    return torch.cat([model.encode_text(part, normalize=True) for part in tokens.split(256)])


@torch.no_grad()
def measure(
    model: open_clip.CLIP, pipeline: StableDiffusion3Pipeline, work: Path, count: int
) -> dict[str, float]:
    """Return how often what the checker sees ranks first, in few-step images of held-out prompts.

    For an attribute: among the prompts that differ in it alone. For `all`: in count, colour, shape
    and background. Images without objects, or with more than four, are left out.
    """
    language = [*data.train_prompts(), *data.heldout_prompts()]
    place = {prompt: i for i, prompt in enumerate(language)}
    texts = _texts(model, work, language, torch.device("cpu"))
    right: dict[str, list[bool]] = {}
    for images, prompts in samples(pipeline, data.heldout_prompts(), count, seed=3):
        inputs = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0
        for image, feature, asked in zip(images, features(model, inputs), prompts, strict=True):
            shown = aligner.shown_prompt(image, asked)
            if not shown:
                continue
            cosines = texts @ feature
            found = {
                name: all(cosines[place[shown]] > cosines[place[other.prompt]] for other in others)
                for name, others in aligner.neighbours(data.parse(shown)).items()
            }
            found["all"] = all(first for name, first in found.items() if name != "size")
            for name, first in found.items():
                right.setdefault(name, []).append(first)
    return {name: round(float(np.mean(values)), 3) for name, values in right.items()}
