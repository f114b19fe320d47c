"""`alignprop train` from the command line, on the embedded model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from alignprop_cli import rng
from alignprop_cli.cli import main
from alignprop_cli.lora.files import LORA_FILE
from alignprop_cli.models.families import TINY

FAST = (
    "--set=sample.num_inference_steps=2",
    "--set=gradient.k_max=2",
    "--set=train.batch_size=2",
    "--set=train.micro_batch=2",
    "--set=eval.images=2",
    "--set=eval.sample_images=2",
)
NOT_REPEATABLE = ("seconds", "peak_memory_gib")


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Return a function that runs `alignprop train` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        with pytest.raises(SystemExit) as ended:
            main(["train", *map(str, args)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return ended.value.code or 0, captured.out, captured.err

    return call


def metrics(folder):
    """Return the lines of metrics.jsonl without what no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in NOT_REPEATABLE} for line in lines]


def adapter(folder, step):
    return load_file(folder / "checkpoints" / f"step-{step:06d}" / LORA_FILE)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_everything_it_promises_and_json_is_all_that_is_printed(run) -> None:
    code, out, _ = run("--preset", "tiny", "--steps", 2, "--output", "r", "--json", *FAST)
    assert code == 0
    result = json.loads(out)
    assert result["schema"] == "alignprop.train/2"
    assert result["steps"] == 2
    assert result["images_seen"] == 4
    assert result["held_out"]["rewards"]["clip"].keys() >= {"base", "tuned", "low", "high"}
    assert set(result["held_out"]["checker"]) == {"background", "colour", "shape", "count", "all"}
    folder = Path("r")
    assert Path(result["adapter"]).is_file()
    assert [line["step"] for line in metrics(folder)] == [1, 2]
    assert Image.open(folder / "before_after.png").width > 400
    assert (folder / "samples" / "step-000000.png").is_file()
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["gradient"]["window_group"] == 2


def test_three_steps_and_three_more_equal_six_bit_for_bit(run) -> None:
    # The quickest model and reward, with what is drawn in every step.
    quick = ("--preset", "tiny_fewstep", "--reward", "brightness", "--set=gradient.method=random_k")
    shared = (*quick, "--set=eval.rewards={}", "--set=eval.every=2", "--quiet", *FAST)
    assert run(*shared, "--steps", 6, "--output", "whole")[0] == 0
    assert run(*shared, "--steps", 3, "--output", "parts")[0] == 0
    assert run("--resume", "parts", "--steps", 6, "--quiet")[0] == 0
    whole, parts = Path("whole"), Path("parts")
    assert metrics(whole) == metrics(parts)
    assert same(adapter(whole, 6), adapter(parts, 6))
    last = Path("checkpoints") / "step-000006"
    optimizers = [load_file(folder / last / "optimizer.safetensors") for folder in (whole, parts)]
    assert same(*optimizers)
    counters = [json.loads((folder / last / "state.json").read_text()) for folder in (whole, parts)]
    # The hash of metrics.jsonl is one of seconds too, and that of state.json has it inside.
    assert all(counts.pop("metrics") and counts.pop("check") for counts in counters)
    assert counters[0] == counters[1]


@pytest.mark.long
def test_the_written_config_repeats_the_run_and_evaluation_changes_no_number(run) -> None:
    assert run("--preset", "tiny", "--steps", 2, "--output", "a", "-q", *FAST)[0] == 0
    assert run("--config", "a/config.yaml", "--output", "b", "-q")[0] == 0
    never = ("--set=eval.every=0", "--set=eval.images=1", "--set=eval.seed=9")
    code, out, _ = run("--config", "a/config.yaml", "--output", "c", "-q", *never)
    assert code == 0
    assert "all images are of one prompt" in out
    assert run("--config", "a/config.yaml", "--output", "d", "-q", "--seed", 1)[0] == 0
    a, b, c, d = (adapter(Path(name), 2) for name in "abcd")
    assert same(a, b)
    assert same(a, c)
    assert not same(a, d)
    assert metrics(Path("a")) == metrics(Path("b"))


def test_the_adapter_draws_the_same_pictures_in_plain_diffusers(run) -> None:
    code, out, _ = run(
        "--preset", "tiny", "--steps", 2, "--output", "r", "--json", *FAST,
        "--set=train.learning_rate=0.02", "--set=eval.images=3",
    )  # fmt: skip
    assert code == 0
    summary = json.loads(out)
    pipeline = StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(Path(summary["adapter"]).parent)
    pipeline.set_progress_bar_config(disable=True)

    from alignprop_cli.config import presets
    from alignprop_cli.evaluation.draw import choose_samples, draw_samples
    from alignprop_cli.lora import files
    from alignprop_cli.lora import layers as lora
    from alignprop_cli.models.families import open_model, sampler
    from alignprop_cli.prompts import load_prompts
    from alignprop_cli.rewards.mixture import build_mixture

    config = presets.resolve(config=Path("r/config.yaml"))
    samples = choose_samples(load_prompts("shapes-heldout"), 3)
    prompts = [sample.prompt for sample in samples]
    model = open_model(config.model, [*prompts, ""], torch.device("cpu"))
    lora.load(model.network.module, files.read(Path(summary["adapter"])), model.id)
    assert lora.is_present(model.network.module)
    mixture = build_mixture(config.reward, config.loss, torch.device("cpu"))
    how = sampler(config.sample, model.family, model.network)
    ours = draw_samples(model, samples, mixture, how, seed=0, batch_size=2)
    keys = [(s.prompt_index, s.image_index) for s in samples]
    latents = rng.image_noise(0, "eval_noise", keys, model.network.latent_shape(None, None))
    theirs = pipeline(
        prompts,
        latents=latents,
        num_inference_steps=config.sample.num_inference_steps,
        guidance_scale=config.sample.guidance_scale,
        output_type="np",
    ).images
    # Bytes against floats: half a step of rounding, and the 1e-3 that is asked for.
    assert np.abs(theirs - ours.images / 255.0).max() < 0.5 / 255.0 + 1e-3
    pipeline.unload_lora_weights()
    plain = pipeline(
        prompts,
        latents=latents,
        num_inference_steps=config.sample.num_inference_steps,
        guidance_scale=config.sample.guidance_scale,
        output_type="np",
    ).images
    assert np.abs(theirs - plain).max() > 0.02


@pytest.mark.long
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path) -> None:
    command = [sys.executable, "-m", "alignprop_cli", "train", "--preset", "tiny", *FAST]
    command += ["--steps", "10000", "--output", "r"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    lines = tmp_path / "r" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.is_file() and lines.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "alignprop train --resume r" in err
    saved = sorted((tmp_path / "r" / "checkpoints").iterdir())
    assert len(saved) == 1
    step = int(saved[0].name.removeprefix("step-"))
    assert len(lines.read_text().splitlines()) == step


BAD = [
    # arguments, exit code, what the message says
    (("--set", "train.stpes=3"), 2, ["train.stpes: unknown key", "Did you mean 'steps'?", "--set"]),
    (("--set", "lora.rank=many"), 2, ["lora.rank", "valid integer", "'many'"]),
    (("--set", "reward.clpi.weight=2"), 2, ["unknown reward 'clpi'", "Did you mean 'clip'?"]),
    (("--set", "reward.clip.modle=x"), 2, ["unknown option 'modle'", "Did you mean 'model'?"]),
    (("--model", "./nowhere"), 3, ["no such file or folder: ./nowhere", "--preset tiny"]),
    (("--model", "owner/name"), 3, ["owner/name", "local folder", "--preset tiny"]),
    (("--set", "train.prompts=none.txt"), 3, ["none.txt"]),
    (("--set", "train.prompts=empty.txt"), 2, ["empty.txt holds no prompt"]),
    (("--set", "train.prompts=shpaes"), 2, ["'shpaes'", "Did you mean 'shapes'?"]),
    (("--output", "full"), 2, ["full exists and is not empty"]),
    (("--set", "gradient.k_max=-1"), 2, ["gradient.k_max", "got -1"]),
    (("--set", "gradient.k_max=21"), 2, ["21 is more than sample.num_inference_steps (5)"]),
    (("--set", "gradient.method=last_k", "--set", "gradient.k=0"), 2, ["gradient.k", "got 0"]),
    (("--set", "reward.clip.model=5"), 2, ["reward.clip.model: expected a str, got 5"]),
    (("--set", "lora.rank=true"), 2, ["lora.rank", "no true or false", "got True"]),
    (("--output", "full/mine.txt/run"), 2, ["cannot make the folder"]),
    (("--config", "tagged.yaml"), 2, ["tagged.yaml", "cannot be read"]),
    (("--set", "lora.target_modules=[nope]"), 2, ["no layer of the model is found", "nope"]),
    (("--set", "lora.init=other"), 3, ["other"]),
    (("--resume", "nowhere"), 2, ["exclude each other"]),
    (("--config", "broken.yaml"), 2, ["broken.yaml", "not valid YAML"]),
    (("--config", "missing.yaml"), 3, ["missing.yaml", "cannot read"]),
    (("--config", "twice.yaml"), 2, ["twice.yaml:3", "given twice"]),
    (("--set", "sample.height=50"), 2, ["sample.height: 50 is not a multiple of 8"]),
]


@pytest.mark.parametrize(("arguments", "code", "parts"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_input_gets_one_message_and_the_documented_exit_code(
    run, arguments, code, parts
) -> None:
    Path("empty.txt").write_text("\n\n")
    Path("full").mkdir()
    Path("full/mine.txt").write_text("keep me")
    Path("tagged.yaml").write_text("model:\n  id: !env HOME\n")
    Path("broken.yaml").write_text("train: [1, 2\n")
    Path("twice.yaml").write_text("train:\n  steps: 1\n  steps: 2\n")
    fast = [f for f in FAST if "k_max" not in f and "inference" not in f]
    result, out, err = run("--preset", "tiny", "--steps", 1, *fast, *arguments)
    assert result == code, err
    assert out == ""
    assert err.startswith(("error:", "alignprop"))
    # A message is one paragraph; long ones may be wrapped.
    flat = " ".join(err.split())
    for part in parts:
        assert part in flat
    assert Path("full/mine.txt").read_text() == "keep me"
    # The next run of that name is not a second one.
    assert list(Path("runs").glob("*")) == []


def test_all_problems_are_reported_together(run) -> None:
    sets = ("--set=train.stpes=3", "--set=lora.rank=0", "--set=gradient.k_max=30")
    code, _, err = run("--preset", "tiny", *sets)
    assert code == 2
    assert "3 problems" in err
    for key in ("train.stpes", "lora.rank", "gradient.k_max"):
        assert key in err


def test_a_damaged_checkpoint_is_said_to_be_damaged(run) -> None:
    assert run("--preset", "tiny", "--steps", 1, "--output", "r", "-q", *FAST)[0] == 0
    Path("r/checkpoints/step-000001/optimizer.safetensors").write_bytes(b"short")
    code, _, err = run("--resume", "r", "--steps", 2, "-q")
    assert code == 4
    assert "damaged checkpoint" in err


@pytest.mark.long
def test_half_a_line_of_metrics_does_not_stop_a_resume(run) -> None:
    assert run("--preset", "tiny", "--steps", 1, "--output", "r", "-q", *FAST)[0] == 0
    with Path("r/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ima')
    assert run("--resume", "r", "--steps", 2, "-q")[0] == 0
    assert [line["step"] for line in metrics(Path("r"))] == [1, 2]


def test_a_resume_that_would_be_another_run_is_refused_with_all_reasons(run) -> None:
    assert run("--preset", "tiny", "--steps", 1, "--output", "r", "-q", *FAST)[0] == 0
    before = Path("r/config.yaml").read_text()
    code, _, err = run(
        "--resume", "r", "--steps", 2, "--seed", 3, "--set=lora.rank=2", "--set=train.batch_size=4"
    )
    assert code == 2
    flat = " ".join(err.split())
    assert "train.seed: 0 in the run, 3 now" in flat
    assert "lora.rank: 8 in the run, 2 now" in flat
    assert "train.batch_size: 2 in the run, 4 now" in flat
    assert "lora.init=r/checkpoints/step-000001" in flat
    assert Path("r/config.yaml").read_text() == before
    # Editing the run's own file is no way around.
    edited = before.replace("learning_rate: 0.002", "learning_rate: 0.1")
    assert edited != before
    Path("r/config.yaml").write_text(edited)
    code, _, err = run("--resume", "r", "--steps", 2, "--dry-run")
    assert code == 2
    assert "train.learning_rate" in err
    # A plan is made of what would be resumed.
    Path("r/config.yaml").write_text(before)
    code, _, err = run("--resume", "r", "--steps", 2, "--checkpoint", 9, "--dry-run")
    assert code == 3
    assert "has no checkpoint '9'" in err


@pytest.mark.long
def test_a_run_killed_while_it_measured_can_be_finished_and_then_is_done(run) -> None:
    assert run("--preset", "tiny", "--steps", 1, "--output", "r", "-q", *FAST)[0] == 0
    summary = Path("r/summary.json")
    said = json.loads(summary.read_text())
    summary.unlink()
    kept = adapter(Path("r"), 1)
    assert run("--resume", "r", "-q", "--set=train.micro_batch=1")[0] == 0
    again = json.loads(summary.read_text())
    assert again["held_out"] == said["held_out"]
    assert same(adapter(Path("r"), 1), kept)
    code, _, err = run("--resume", "r", "-q")
    assert code == 2
    assert "nothing to do" in err
    # A scheduler repeats its line until it ends well.
    line = ("--preset", "tiny", "--steps", 1, "--resume", "auto", "--output", "r", *FAST)
    code, _, err = run(*line)
    assert code == 0
    assert "nothing to do" in err


@pytest.mark.long
def test_a_run_stopped_before_its_first_checkpoint_begins_again(run) -> None:
    assert run("--preset", "tiny", "--steps", 1, "--output", "r", "-q", *FAST)[0] == 0
    kept = adapter(Path("r"), 1)
    shutil.rmtree("r/checkpoints")
    code, _, err = run("--preset", "tiny", "--resume", "auto", "--output", "r")
    assert code == 0
    assert "no checkpoint yet" in err
    assert same(adapter(Path("r"), 1), kept)


@pytest.mark.long
def test_resume_auto_finds_the_newest_run_of_this_name_or_begins_one(run) -> None:
    assert run("--resume", "auto")[0] == 3
    once = ("--steps", 1, "-q", *FAST)
    assert run("--preset", "tiny", "--resume", "auto", *once)[0] == 0
    assert run("--preset", "tiny", *once)[0] == 0
    assert run("--preset", "tiny_k1", *once)[0] == 0
    assert run("--preset", "tiny", "--resume", "auto", "--steps", 2, "-q")[0] == 0
    steps = {path.name: len(metrics(path)) for path in Path("runs").iterdir()}
    assert steps == {"tiny": 1, "tiny-2": 2, "tiny_k1": 1}
    assert run("--resume", "auto", "--steps", 3, "-q")[0] == 0
    assert len(metrics(Path("runs/tiny-2"))) == 3


@pytest.mark.long
def test_a_run_can_start_from_another_runs_lora_and_records_what_that_is(run) -> None:
    start = ("--preset", "tiny", "--steps", 1, "-q", *FAST)
    assert run(*start, "--output", "a", "--set=lora.rank=2", "--set=lora.alpha=3")[0] == 0
    assert (
        run(*start, "--output", "b", "--set=lora.init=a", "--set=train.learning_rate=1e-9")[0] == 0
    )
    settings = yaml.safe_load(Path("b/config.yaml").read_text())["lora"]
    assert (settings["rank"], settings["alpha"]) == (2, 3.0)
    a, b = adapter(Path("a"), 1), adapter(Path("b"), 1)
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], atol=1e-8, rtol=0.0) for name in a)
    # What it started from may be gone by then.
    shutil.rmtree("a")
    assert run("--resume", "b", "--steps", 2, "-q")[0] == 0


@pytest.mark.long
def test_a_standardised_mixture_measures_the_base_model_once_and_resumes_with_it(run) -> None:
    mix = ("--reward=clip:0.5,compressibility:0.5", "--set=reward.clip.standardise=true")
    assert run("--preset", "tiny", "--steps", 2, "--output", "six", "-q", *FAST, *mix)[0] == 0
    assert run("--preset", "tiny", "--steps", 1, "--output", "r", "-q", *FAST, *mix)[0] == 0
    member = yaml.safe_load(Path("r/config.yaml").read_text())["reward"]["clip"]
    summary = json.loads(Path("r/summary.json").read_text())
    assert member["base_mean"] == summary["held_out"]["rewards"]["clip"]["base"]
    assert member["base_std"] > 0.0
    # The training's evaluation may change; what was measured stays.
    assert run("--resume", "r", "--steps", 2, "-q", "--set=eval.images=3")[0] == 0
    assert same(adapter(Path("r"), 2), adapter(Path("six"), 2))
    # The true size is recorded beside the estimate.
    line = metrics(Path("r"))[-1]["rewards"]
    assert list(line) == ["clip", "compressibility", "jpeg_kilobytes"]
    assert 0.6 < line["jpeg_kilobytes"]["mean"] < 3.0


def test_a_reward_without_a_gradient_is_refused_before_anything_is_loaded(run) -> None:
    code, _, err = run("--preset", "tiny", "--reward", "hps-official")
    assert code == 2
    assert "cannot be trained on" in err
    assert not Path("runs").exists()


def test_training_on_the_evaluations_prompts_is_said(run) -> None:
    args = ("--preset", "tiny", "--steps", 1, "--output", "r", *FAST)
    code, _, err = run(*args, "--set=eval.prompts=shapes")
    assert code == 0
    assert "800 of the 800 prompts of eval.prompts are trained on" in " ".join(err.split())


def test_dry_run_prints_the_plan_and_writes_nothing(run) -> None:
    code, out, _ = run("--preset", "tiny", "--dry-run")
    assert code == 0
    assert "32 images a step" in out
    assert not list(Path().iterdir())


@pytest.mark.long
def test_a_plan_is_made_for_cards_that_are_not_here(run) -> None:
    dry = ("--preset", "aesthetic", "--dry-run", "--json")
    code, out, _ = run(*dry, "--gpu-memory", "12GB", "--gpus", 2)
    assert code == 0
    said = json.loads(out)
    plan = said["plan"]
    assert plan["micro_batch"] * plan["accumulation"] * 2 == 128
    assert plan["processes"] == 2
    assert plan["checkpoint_network"] == "call"  # 50 calls of 2 GiB would not fit
    peak = sum(plan["estimate"]["parts"].values())
    assert 6 * 2**30 < peak < 12 * 2**30
    assert plan["estimate"]["floor"] < plan["estimate"]["flops"] < 1.5 * plan["estimate"]["floor"]
    assert not list(Path().iterdir())
    code, _, err = run(*dry, "--gpu-memory", "4GB")
    assert code == 4
    flat = " ".join(err.split())
    assert "no plan fits 4.00 GiB (--gpu-memory)" in flat
    assert "bfloat16 as the dtype of a reward with a network, a smaller sample.height" in flat
    advised = ("reward.aesthetic.dtype=bfloat16", "sample.height=256", "sample.width=256")
    code, _, _ = run(*dry, "--gpu-memory", "4GB", *(f"--set={advice}" for advice in advised))
    assert code == 0
    several = ("--gpu-memory", "8GB,12GB")
    for wrong in (
        *(("--gpu-memory", "much"), ("--gpu-memory", "8GB,"), (*several, "--gpu", "rtx4090")),
        *(("--gpus", 2), ("--gpu", "rtx1")),
    ):
        code, _, err = run(*dry, *wrong)
        assert code == 2
        assert wrong[0] in err
    for memory in (("--gpu-memory", "12GB"), several):
        code, _, err = run("--preset", "tiny", *memory)
        assert code == 2
        assert "--dry-run" in err


def test_presets_are_listed_and_shown(run) -> None:
    code, out, _ = run("--list-presets", "--json")
    assert code == 0
    assert {"tiny", "tiny_k1"} <= json.loads(out)["presets"].keys()
    code, out, _ = run("--preset", "tiny_k1", "--show-preset", "--seed", 7)
    assert code == 0
    shown = yaml.safe_load(out)
    assert shown["gradient"]["k"] == 1
    assert shown["train"]["seed"] == 7


def test_without_a_preset_the_way_on_is_said(run) -> None:
    code, _, err = run()
    assert code == 2
    assert "--preset tiny" in err


@pytest.mark.parametrize("changed", ["train.prompts", "reward.grey.py:grey", "model.id"])
@pytest.mark.long
def test_a_run_is_not_resumed_with_other_files_than_it_began_with(run, changed) -> None:
    Path("prompts.txt").write_text("a red circle\n")
    code = "def grey(images, prompts):\n    return -((images - {}) ** 2).mean(dim=(1, 2, 3))\n"
    Path("grey.py").write_text(code.format(0.5))
    shutil.copytree(TINY, "model")
    named = ("--model=model", "--set=train.prompts=prompts.txt", "--reward=grey.py:grey")
    given = ("--preset", "tiny", *named, "--output", "r", "-q", *FAST)
    assert run(*given, "--steps", 1)[0] == 0
    assert run("--resume", "r", "--steps", 2, "-q", *named)[0] == 0
    if changed == "train.prompts":
        Path("prompts.txt").write_text("a blue circle\n")
    elif changed == "model.id":
        weights = Path("model/unet/diffusion_pytorch_model.safetensors")
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    else:
        Path("grey.py").write_text(code.format(0.4))
    code, _, err = run("--resume", "r", "--steps", 3, "-q", *named)
    assert code == 2
    assert f"{changed}: its content has changed since the checkpoint" in err
    assert err.count("its content has changed") == 1


@pytest.mark.long
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_resumed(run) -> None:
    given = ("--preset", "tiny", "--steps", 2, "-q", "--set=output.save_every=1", *FAST)
    for folder in ("whole", "damaged"):
        assert run(*given, "--output", folder)[0] == 0
    file = Path("damaged/checkpoints/step-000002/optimizer.safetensors")
    file.write_bytes(file.read_bytes()[:-4096] + bytes(4096))
    code, _, err = run("--resume", "damaged", "--steps", 2, "-q")
    assert code == 0, err
    assert "step-000002: damaged checkpoint: optimizer.safetensors is not as it was written" in err
    assert "resuming from step-000001 instead" in err
    assert same(adapter(Path("whole"), 2), adapter(Path("damaged"), 2))
    assert metrics(Path("whole")) == metrics(Path("damaged"))


@pytest.mark.long
def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(run, monkeypatch) -> None:
    from alignprop_cli.training import checkpoint

    assert run("--preset", "tiny", "--steps", 1, "--output", "r", "-q", *FAST)[0] == 0

    def refused(file):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(checkpoint, "sha256", refused)
    code, _, err = run("--resume", "r", "--steps", 2, "-q")
    assert code == 4
    assert "Permission denied" in err
    assert "damaged" not in err


def test_sigusr1_saves_and_goes_on(tmp_path, warm) -> None:
    command = ["train", "--preset", "tiny", "--output", "r"]
    given = [*command, "--steps", "400", "--set=eval.every=0", "--set=output.save_every=0", *FAST]
    process = warm.start(given, tmp_path)
    folder = tmp_path / "r"
    deadline = time.monotonic() + 120.0
    while not (folder / "metrics.jsonl").is_file() or not metrics(folder):
        assert not process.ended(), process.err()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGUSR1)
    while not list(folder.glob("checkpoints/step-*")):
        assert not process.ended(), process.err()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    seen = len(metrics(folder))
    while len(metrics(folder)) <= seen:
        assert not process.ended(), process.err()
        time.sleep(0.05)
    # SIGHUP is what a terminal sends that is closed.
    os.kill(process.pid, signal.SIGHUP)
    ended = process.wait()
    err = ended.err
    assert ended.code == 128 + signal.SIGHUP, err
    assert "is saved (SIGUSR1)" in err
    assert "stopped by SIGHUP after step" in err
    assert len(list(folder.glob("checkpoints/step-*"))) == 2
    assert not (folder / ".lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["draft_lv", "refl", "drtune", "leap", "sparse"])
def test_every_estimator_trains_and_resumes_bit_for_bit(run, tmp_path, method) -> None:
    given = (
        *("--preset", "tiny", "-q", *FAST),
        *("--set=sample.num_inference_steps=4", f"--set=gradient.method={method}"),
        "--set=gradient.detach_uncond=true",
    )
    assert run(*given, "--steps", 2, "--output", "whole")[0] == 0
    assert run(*given, "--steps", 1, "--output", "parts")[0] == 0
    assert run("--resume", "parts", "--steps", 2, "-q")[0] == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    whole, parts = (adapter(tmp_path / name, 2) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    # Trained at all: the first checkpoint is another one.
    first = adapter(tmp_path / "parts", 1)
    assert any(not torch.equal(first[name], parts[name]) for name in first)


def test_an_impossible_estimator_is_refused_with_a_message(run) -> None:
    code, _, err = run(
        "--preset=tiny", "--set=gradient.method=sparse", "--set=gradient.calls=9", "--dry-run"
    )
    assert code == 2
    assert "gradient.calls: 9 is more than sample.num_inference_steps (5)" in err
