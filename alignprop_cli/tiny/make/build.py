"""Train the embedded model from scratch: `python -m alignprop_cli.tiny.make.build --work DIR`.

There are six stages: autoencoder, unet, aligner, flow, fewstep, resnet. Each prints its metrics
and can be resumed. Then `finish` writes card.json with the metrics of the written weights. Users
and tests never run this.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from alignprop_cli.tiny import language as data
from alignprop_cli.tiny.make import aligner, autoencoder, fewstep, flow, resnet, tokenizer, unet

HERE = Path(__file__).parent.parent
# How long each takes: README.md next to the weights.
STEPS = {
    "autoencoder": 3000,
    "unet": 2300,
    "aligner": 3000,
    "flow": 10_000,
    "fewstep": 3000,
    "resnet": 2500,
}
GUIDANCE_SCALE = 3.0
FEWSTEP = "fewstep"
"""Name of the variant of the weights, in the folder of the flow model."""
_CARD_SAMPLES = 500


def main() -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for states; resumable")
    parser.add_argument("--stage", choices=[*STEPS, "finish", "all"], default="all")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for the weights")
    arguments = parser.parse_args()
    work, stage = arguments.work, arguments.stage
    work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = tokenizer.save(work / "tokenizer")
    # A stage caches what it made with the weights of an earlier one; new weights make it useless.
    if stage in ("autoencoder", "all"):
        vae = autoencoder.train(work, device, STEPS["autoencoder"])
        (work / "latents.pt").unlink(missing_ok=True)
        torch.save(vae.state_dict(), work / "autoencoder.pt")
    if stage in ("unet", "all"):
        vae = load_autoencoder(work, device)
        pipeline = unet.train(vae, words, work, device, STEPS["unet"])
        (work / "generated.pt").unlink(missing_ok=True)
        save_pipeline(pipeline, work / "tokenizer", arguments.output / "pipeline")
    if stage in ("aligner", "all"):
        model = aligner.train(
            load_pipeline(arguments.output, device), work, device, STEPS["aligner"]
        )
        aligner.save(model, arguments.output / "aligner")
    if stage in ("flow", "all"):
        tiny = load_pipeline(arguments.output, device)
        network = flow.train(tiny, work, device, STEPS["flow"])
        for stale in ("paths.pt", "fewstep.pt"):
            (work / stale).unlink(missing_ok=True)
        save_pipeline(flow.assemble(tiny, network), work / "tokenizer", arguments.output / "flow")
    if stage in ("fewstep", "all"):
        teacher = load_flow(arguments.output, device)
        network = fewstep.train(teacher, work, device, STEPS["fewstep"])
        folder = arguments.output / "flow" / "transformer"
        network.to("cpu", torch.float16).save_pretrained(folder, variant=FEWSTEP)
        forget_origin(folder / "config.json")
        (work / "few.pt").unlink(missing_ok=True)
    if stage in ("resnet", "all"):
        few = load_flow(arguments.output, device, FEWSTEP)
        first = load_aligner(arguments.output / "aligner")
        model = resnet.train(first, few, work, device, STEPS["resnet"])
        aligner.save(model, arguments.output / "aligner_resnet", resnet.CONFIG)
    if stage in ("finish", "all"):
        write_card(arguments.output, work)
        write_flow_card(arguments.output)
        write_resnet_card(arguments.output, work)


def load_autoencoder(work: Path, device: torch.device) -> AutoencoderKL:
    """Return the autoencoder of stage one."""
    vae = autoencoder.new_autoencoder()
    vae.load_state_dict(torch.load(work / "autoencoder.pt", weights_only=True))
    return vae.to(device).eval().requires_grad_(False)


def load_pipeline(output: Path, device: torch.device) -> StableDiffusionPipeline:
    """Load the pipeline that was written, as users do."""
    pipeline = StableDiffusionPipeline.from_pretrained(output / "pipeline", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def load_flow(
    output: Path, device: torch.device, variant: str | None = None
) -> StableDiffusion3Pipeline:
    """Load the flow model that was written, or its few-step variant, as users do."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        output / "flow", variant=variant, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def load_aligner(directory: Path) -> open_clip.CLIP:
    """Load an image-text model that was written, as users do."""
    model = open_clip.create_model(f"local-dir:{directory}", precision="fp32")
    assert isinstance(model, open_clip.CLIP)
    return model.eval()


def save_pipeline(pipeline: DiffusionPipeline, words: Path, directory: Path) -> None:
    """Write a pipeline in half precision, with the tokenizers' files for old readers too."""
    pipeline.to("cpu", torch.float16).save_pretrained(directory)
    for name, part in pipeline.components.items():
        # One that was used or loaded would save what it remembers of that.
        if name.startswith("tokenizer") and part is not None:
            shutil.copytree(words, directory / name, dirs_exist_ok=True)
        # If no dtype is given, diffusers loads in float32 and transformers in that of the config.
        if name.startswith("text_encoder") and part is not None:
            config = directory / name / "config.json"
            values = json.loads(config.read_text()) | {"dtype": "float32"}
            config.write_text(json.dumps(values, indent=2) + "\n")
    for config in directory.glob("*/config.json"):
        forget_origin(config)


def forget_origin(config: Path) -> None:
    """Drop from a part's configuration the folder that it was loaded from."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2) + "\n")


def write_card(output: Path, work: Path) -> None:
    """Measure the written weights, and write card.json and the sheet of samples."""
    # Loaded from the files, so that the metrics are those of the weights in half precision.
    pipeline = load_pipeline(output, torch.device("cpu"))
    model = load_aligner(output / "aligner")
    files = [
        *(output / "pipeline").rglob("*.safetensors"),
        *(output / "aligner").glob("*.safetensors"),
    ]
    card = {
        "weights_megabytes": round(sum(file.stat().st_size for file in files) / 1e6, 2),
        "parameters": {
            "unet": pipeline.unet.num_parameters(),
            "vae": pipeline.vae.num_parameters(),
            "text_encoder": pipeline.text_encoder.num_parameters(),
            "aligner": sum(p.numel() for p in model.parameters()),
        },
        "steps": {stage: STEPS[stage] for stage in ("autoencoder", "unet", "aligner")},
        "autoencoder": autoencoder.measure(pipeline.vae, 300),
        "samples": {
            "images": _CARD_SAMPLES,
            "prompts": "held out",
            "num_inference_steps": 20,
            "guidance_scale": GUIDANCE_SCALE,
            "right": unet.measure(pipeline, _CARD_SAMPLES, guidance_scale=GUIDANCE_SCALE),
        },
        "aligner_true_prompt_first": aligner.measure(model, work, 500),
    }
    _update_card(output, **card)
    # Another seed than the default, so that the sheet shows none of the measured samples.
    images, _ = unet.samples(pipeline, 40, guidance_scale=GUIDANCE_SCALE, seed=100)
    _save_sheet(images, output / "samples.png")


def write_flow_card(output: Path) -> None:
    """Measure the written flow model and its few-step variant, for card.json and their sheet."""
    cpu = torch.device("cpu")
    base, few = load_flow(output, cpu), load_flow(output, cpu, FEWSTEP)
    size = sum(file.stat().st_size for file in (output / "flow").rglob("*.safetensors"))
    guided = {"count": _CARD_SAMPLES, "guidance_scale": flow.GUIDANCE_SCALE}
    plain = {"count": _CARD_SAMPLES, "guidance_scale": 0.0}
    _update_card(
        output,
        flow={
            "weights_megabytes": round(size / 1e6, 2),
            "parameters": {
                "transformer": base.transformer.num_parameters(),
                "text_encoder": base.text_encoder.num_parameters(),
                "text_encoder_2": base.text_encoder_2.num_parameters(),
            },
            "steps": STEPS["flow"],
            "samples": {
                "images": _CARD_SAMPLES,
                "prompts": "held out",
                "num_inference_steps": 20,
                "guidance_scale": flow.GUIDANCE_SCALE,
                "right": unet.measure(base, **guided),
            },
        },
        fewstep={
            "steps": STEPS["fewstep"],
            "samples": {
                "images": _CARD_SAMPLES,
                "prompts": "held out",
                "sigmas": fewstep.SIGMAS,
                "guidance_scale": 0.0,
                "right": unet.measure(fewstep.few_calls(few), **plain),
            },
        },
    )
    # A row of each, of the same prompts.
    images = [
        unet.samples(base, 10, guidance_scale=flow.GUIDANCE_SCALE, seed=100)[0],
        unet.samples(fewstep.few_calls(few), 10, guidance_scale=0.0, seed=100)[0],
    ]
    _save_sheet(np.concatenate(images), output / "flow_samples.png")


def write_resnet_card(output: Path, work: Path) -> None:
    """Measure the second image-text model beside the first one, for card.json."""
    few = load_flow(output, torch.device("cpu"), FEWSTEP)
    models = {name: load_aligner(output / name) for name in ("aligner", "aligner_resnet")}
    weights = output / "aligner_resnet" / "open_clip_model.safetensors"
    _update_card(
        output,
        resnet={
            "weights_megabytes": round(weights.stat().st_size / 1e6, 2),
            "parameters": sum(p.numel() for p in models["aligner_resnet"].parameters()),
            "steps": STEPS["resnet"],
            "few_step_images": 2 * _CARD_SAMPLES,
            "what_is_seen_first": {
                name: resnet.measure(model, few, work, 2 * _CARD_SAMPLES)
                for name, model in models.items()
            },
        },
    )


def _update_card(output: Path, **entries: Any) -> None:
    """Set entries of card.json, keep its others, and show it."""
    file = output / "card.json"
    card = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(card | entries, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(card | entries, indent=2))


def _save_sheet(images: data.Pixels, file: Path) -> None:
    """Write images (N, 48, 48, 3) in rows of ten, enlarged."""
    rows = [np.concatenate(images[i : i + 10], axis=1) for i in range(0, len(images), 10)]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet = sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.BICUBIC)
    sheet.save(file, optimize=True)


if __name__ == "__main__":
    main()
