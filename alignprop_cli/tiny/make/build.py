"""Train the embedded model from scratch: `python -m alignprop_cli.tiny.make.build --work DIR`.

There are three stages: autoencoder, unet, aligner. Each prints its metrics and can be resumed. Then
`finish` writes card.json with the metrics of the written weights. Users and tests never run this.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from alignprop_cli.tiny.make import aligner, autoencoder, tokenizer, unet

HERE = Path(__file__).parent.parent
# Each stage takes 7 to 18 minutes on 2 cores: see README.md next to the weights.
STEPS = {"autoencoder": 3000, "unet": 2300, "aligner": 3000}
GUIDANCE_SCALE = 3.0
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
    vae = load_autoencoder(work, device)
    if stage in ("unet", "all"):
        pipeline = unet.train(vae, words, work, device, STEPS["unet"])
        (work / "generated.pt").unlink(missing_ok=True)
        save_pipeline(pipeline, work / "tokenizer", arguments.output / "pipeline")
    if stage in ("aligner", "all"):
        model = aligner.train(
            load_pipeline(arguments.output, device), work, device, STEPS["aligner"]
        )
        aligner.save(model, arguments.output / "aligner")
    if stage in ("finish", "all"):
        write_card(arguments.output, work)


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


def save_pipeline(pipeline: StableDiffusionPipeline, words: Path, directory: Path) -> None:
    """Write the pipeline in half precision, with the tokenizer's files for old readers too."""
    # The tokenizer remembers the padding and truncation of its last call, and would save them.
    pipeline.tokenizer.backend_tokenizer.no_padding()
    pipeline.tokenizer.backend_tokenizer.no_truncation()
    pipeline.to("cpu", torch.float16).save_pretrained(directory)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(words / name, directory / "tokenizer" / name)
    # If no dtype is given, diffusers loads in float32 and transformers in that of the config.
    config = directory / "text_encoder" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n"
    )


def write_card(output: Path, work: Path) -> None:
    """Measure the written weights, and write card.json and the sheet of samples."""
    # Loaded from the files, so that the metrics are those of the weights in half precision.
    pipeline = load_pipeline(output, torch.device("cpu"))
    model = open_clip.create_model(f"local-dir:{output / 'aligner'}", precision="fp32").eval()
    size = sum(file.stat().st_size for file in output.rglob("*.safetensors"))
    card = {
        "weights_megabytes": round(size / 1e6, 2),
        "parameters": {
            "unet": pipeline.unet.num_parameters(),
            "vae": pipeline.vae.num_parameters(),
            "text_encoder": pipeline.text_encoder.num_parameters(),
            "aligner": sum(p.numel() for p in model.parameters()),
        },
        "steps": STEPS,
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
    (output / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(card, indent=2))
    # Another seed than the default, so that the sheet shows none of the measured samples.
    images, _ = unet.samples(pipeline, 40, guidance_scale=GUIDANCE_SCALE, seed=100)
    rows = [np.concatenate(images[i : i + 10], axis=1) for i in range(0, 40, 10)]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.BICUBIC).save(
        output / "samples.png", optimize=True
    )


if __name__ == "__main__":
    main()
