"""`alignprop evaluate` from the command line, on a small model with random weights."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from alignprop_cli.cli import main
from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.lora import files
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.files import LORA_FILE
from alignprop_cli.models.families import open_model
from alignprop_cli.rewards.clip import ClipReward
from tests.factories import fill_lora_b, small_pipeline

TYPED: dict[str, str] = {}
"""Flags for the base model and the prompts of `trained`."""


def run(capsys, *args):
    """Return the exit code, standard output and standard error of `alignprop evaluate`."""
    given = list(map(str, args))
    if given[0] != "base" and "--config" not in given:
        # What the run's configuration names, and the program does not ship, has to be typed too.
        for flag, value in TYPED.items():
            given += [] if flag in given else [flag, value]
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *given])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return the folder of a small pipeline."""
    return small_pipeline(tmp_path_factory.mktemp("evaluate") / "base")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Return a run folder with two checkpoints, as training leaves it."""
    run_folder = tmp_path_factory.mktemp("evaluate") / "run"
    prompts = run_folder.parent / "prompts.txt"
    prompts.write_text("a cat\na dog\n<b>../fish</b>\n")
    config = {
        "model": {"id": str(base)},
        "sample": {"num_inference_steps": 2, "guidance_scale": 2.0},
        "gradient": {"k_max": 2},
        "reward": {"brightness": {}},
        "eval": {"prompts": str(prompts), "images": 4, "batch_size": 3},
    }
    model = open_model(ModelConfig(id=str(base)), [], torch.device("cpu"))
    module = model.network.module
    lora.inject(module, rank=2, alpha=4, target_modules=("to_q", "to_v"), seed=0)
    for step in (1, 2):
        fill_lora_b(module, seed=step, scale=2.0)
        folder = run_folder / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        header = {
            "alignprop.base_model": str(base),
            "alignprop.base_fingerprint": model.fingerprint,
            "alignprop.config": json.dumps(config),
        }
        files.save(
            folder,
            lora.weights(module),
            header,
            prefix=model.family.lora_prefix,
            adapter_metadata=lora.adapter_metadata(module),
        )
    TYPED.update({"--model": str(base), "--prompts": str(prompts)})
    # JSON is YAML.
    (run_folder / "config.yaml").write_text(json.dumps(config))
    return run_folder


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_run_is_compared_with_its_base_model(capsys, trained, tmp_path):
    folder = tmp_path / "out"
    code, out, err = run(capsys, trained, "--reward", "brightness,contrast", "-o", folder)
    assert code == 0, err
    assert "4 images" in out
    assert "contrast" in out
    results = json.loads((folder / "results.json").read_text())
    assert results["schema"] == "alignprop.evaluate/4"
    assert results["adapters"]["tuned"]["file"].endswith(f"step-000002/{LORA_FILE}")
    assert results["checker"] == {}
    metrics = results["rewards"]["brightness"]
    base, tuned = metrics["base"], metrics["tuned"]
    assert tuned["low"] <= tuned["difference"] <= tuned["high"]
    assert tuned["mean"] - base["mean"] == pytest.approx(tuned["difference"])
    # The metrics are those of the images that were written.
    for which in ("base", "tuned"):
        written = sorted((folder / "images" / which).iterdir())
        assert [p.name for p in written] == [f"{i:04d}.png" for i in range(4)]
        luma = [(pixels(p) / 255.0 @ [0.299, 0.587, 0.114]).mean() for p in written]
        assert np.mean(luma) == pytest.approx(metrics[which]["mean"], abs=0.02)
    assert (
        pixels(folder / "images/base/0000.png") != pixels(folder / "images/tuned/0000.png")
    ).any()
    assert Image.open(folder / "sheet.png").width > 300


def test_images_say_how_they_were_sampled_and_prompts_are_no_file_names(capsys, trained, tmp_path):
    code, _, _ = run(capsys, trained, "--seed", "5", "-o", tmp_path / "out", "-q")
    assert code == 0
    texts = Image.open(tmp_path / "out" / "images" / "tuned" / "0002.png").info
    assert texts["prompt"] == "<b>../fish</b>"
    assert texts["seed"] == "5"
    assert "brightness" in json.loads(texts["rewards"])
    assert len(texts["adapter_sha256"]) == 64


def test_batch_size_changes_no_image_and_seed_changes_all(capsys, trained, tmp_path):
    for name, *args in (("a", "--batch-size", 1), ("b", "--batch-size", 4), ("c", "--seed", 1)):
        assert run(capsys, trained, *args, "-o", tmp_path / name)[0] == 0
    for number in range(4):
        a, b, c = (
            pixels(tmp_path / n / "images/tuned" / f"{number:04d}.png").astype(int) for n in "abc"
        )
        assert abs(a - b).max() <= 1
        assert abs(a - c).max() > 1


def test_what_is_not_used_of_a_file_is_said(capsys, trained, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    state = load_file(trained / "checkpoints" / "step-000002" / LORA_FILE)
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora"
    state |= {f"{text}_A.weight": torch.ones(2, 32), f"{text}_B.weight": torch.ones(32, 2)}
    save_file(state, folder / LORA_FILE, {"format": "pt"})
    ask = ("--config", trained / "config.yaml", "-n", 1, "-o", tmp_path / "out")
    code, _, err = run(capsys, folder, *ask)
    assert code == 0, err
    assert "layers of the text encoder are left out" in err
    code, _, err = run(capsys, trained, *ask, "--overwrite")
    assert code == 0
    assert "left out" not in err


def test_the_base_model_alone_samples_the_same_base_images(capsys, trained, tmp_path):
    assert run(capsys, trained, "-o", tmp_path / "pair")[0] == 0
    code, out, _ = run(
        capsys, "base", "--config", trained / "config.yaml", "-o", tmp_path / "base", "--json"
    )
    values = json.loads(out)
    assert code == 0
    assert values["adapters"] == {}
    assert set(values["rewards"]["brightness"]) == {"trained_on", "base"}
    assert [p.name for p in (tmp_path / "base" / "images").iterdir()] == ["base"]
    # Alone it has no change to sort its images by, but rewards.
    page = (tmp_path / "base" / "report.html").read_text(encoding="utf-8")
    assert "change of" not in page
    assert "brightness, largest first" in page
    shown = [float(value) for value in re.findall(r'data-sort1="([^"]*)"', page)]
    assert np.mean(shown) == pytest.approx(values["rewards"]["brightness"]["base"]["mean"])
    for number in range(4):
        name = f"images/base/{number:04d}.png"
        np.testing.assert_array_equal(
            pixels(tmp_path / "base" / name), pixels(tmp_path / "pair" / name)
        )


def test_output_is_in_the_run_and_is_not_replaced_unasked(capsys, trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    assert run(capsys, copy, "-n", 1)[0] == 0
    assert (copy / "evaluation" / "results.json").is_file()
    code, _, err = run(capsys, copy, "-n", 1)
    assert code == 2
    assert "--overwrite" in err
    assert run(capsys, copy, "-n", 2, "--overwrite")[0] == 0
    assert len(list((copy / "evaluation" / "images" / "base").iterdir())) == 2
    checkpoint = copy / "checkpoints" / "step-000001"
    code, out, _ = run(capsys, checkpoint, "-n", 1, "--json")
    assert code == 0
    assert json.loads(out)["output"] == str(copy / "evaluation-step-000001")


def test_a_bare_file_is_sampled_as_its_header_says(capsys, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained / "checkpoints/step-000002" / LORA_FILE, tmp_path / "mine.safetensors")
    code, out, err = run(capsys, "mine.safetensors", "-n", 1, "--json")
    values = json.loads(out)
    assert code == 0, err
    assert values["sample"]["num_inference_steps"] == 2
    assert values["output"] == str(tmp_path / "evaluation-mine")


def test_an_interval_over_one_prompt_is_said_to_say_nothing(capsys, trained, tmp_path):
    for images, told in ((1, True), (2, False)):
        code, out, err = run(capsys, trained, "-n", images, "-o", tmp_path / str(images))
        assert code == 0, err
        assert ("all images are of one prompt" in out) is told


def test_a_soup_is_evaluated_like_any_lora(capsys, trained, tmp_path):
    steps = [trained / "checkpoints" / f"step-{n:06d}" for n in (1, 2)]
    with pytest.raises(SystemExit):
        main(["soup", *map(str, steps), "--coef", "0", "-o", str(tmp_path / "soup"), "-q"])
    capsys.readouterr()
    assert run(capsys, tmp_path / "soup", "-o", tmp_path / "a")[0] == 0
    assert run(capsys, trained, "-o", tmp_path / "b")[0] == 0
    # No share of the first is the second.
    a, b = (json.loads((tmp_path / n / "results.json").read_text())["rewards"] for n in "ab")
    assert a["brightness"]["tuned"] == pytest.approx(b["brightness"]["tuned"], abs=1e-5)


def test_several_loras_are_compared_on_the_same_samples(capsys, trained, tmp_path):
    steps = [trained / "checkpoints" / f"step-{n:06d}" for n in (1, 2)]
    code, out, err = run(capsys, *steps, "-o", tmp_path / "both", "--json")
    assert code == 0, err
    both = json.loads(out)
    names = ["run-step-000001", "run-step-000002"]
    assert list(both["adapters"]) == names
    assert sorted(p.name for p in (tmp_path / "both" / "images").iterdir()) == ["base", *names]
    for name, step in zip(names, steps, strict=True):
        _, out, _ = run(capsys, step, "-o", tmp_path / name, "--json")
        alone = json.loads(out)["rewards"]["brightness"]["tuned"]
        assert both["rewards"]["brightness"][name] == pytest.approx(alone, abs=1e-5)


@pytest.mark.long
def test_strengths_make_a_curve_from_the_base_model_on(capsys, trained, tmp_path):
    code, out, err = run(capsys, trained, "--scale", "1,0,0.5", "-o", tmp_path / "out", "--json")
    assert code == 0, err
    metrics = json.loads(out)["rewards"]["brightness"]
    assert set(metrics) == {"trained_on", "base", "strength 0", "strength 0.5", "strength 1"}
    # Exactly: nothing is added to any weight.
    assert metrics["strength 0"]["ties"] == 1.0
    assert run(capsys, trained, "-o", tmp_path / "whole", "-q")[0] == 0
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert metrics["strength 1"] == pytest.approx(whole["rewards"]["brightness"]["tuned"], abs=1e-6)
    assert Image.open(tmp_path / "out" / "curve.png").width > 300
    assert not (tmp_path / "whole" / "curve.png").exists()


def test_another_checkpoint_of_a_run_is_the_one_that_its_folder_is(capsys, trained, tmp_path):
    for number, name in enumerate(("1", "step-000001")):
        out = tmp_path / f"by_name_{number}"
        assert run(capsys, trained, "--checkpoint", name, "-o", out, "-q")[0] == 0
    path = trained / "checkpoints" / "step-000001"
    assert run(capsys, path, "-o", tmp_path / "by_path", "-q")[0] == 0
    found = [
        json.loads((tmp_path / name / "results.json").read_text())
        for name in ("by_name_0", "by_name_1", "by_path")
    ]
    assert found[0]["adapters"] == found[1]["adapters"] == found[2]["adapters"]
    assert found[0]["rewards"] == found[2]["rewards"]


def test_half_strength_is_the_soup_with_the_base_model(capsys, trained, tmp_path):
    with pytest.raises(SystemExit):
        main(["soup", str(trained), "base", "--coef", "0.5", "-o", str(tmp_path / "half"), "-q"])
    capsys.readouterr()
    assert run(capsys, tmp_path / "half", "-o", tmp_path / "a")[0] == 0
    assert run(capsys, trained, "--scale", "0.5", "-o", tmp_path / "b")[0] == 0
    for number in range(4):
        a = pixels(tmp_path / "a/images/tuned" / f"{number:04d}.png").astype(int)
        b = pixels(tmp_path / "b/images/strength 0.5" / f"{number:04d}.png").astype(int)
        assert abs(a - b).max() <= 1


def test_several_images_of_a_prompt_show_how_different_they_are(capsys, tmp_path):
    code, out, err = run(
        capsys,
        *["base", "--preset", "tiny", "--json", "--images", "6"],
        *["--images-per-prompt", "3", "-o", tmp_path / "out"],
    )
    assert code == 0, err
    values = json.loads(out)
    # Two prompts of three images, each with its own noise.
    assert [s["image_index"] for s in values["samples"]] == [0, 1, 2, 0, 1, 2]
    assert [p["images"] for p in values["by_prompt"]] == [3, 3]
    images = [pixels(tmp_path / "out" / "images" / "base" / f"{i:04d}.png") for i in range(6)]
    model = ClipReward("tiny")
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255.0
    features = model.image_features(batch)
    expected = [
        1.0 - float((features[i] * features[j]).sum())
        for first in (0, 3)
        for i, j in ((first, first + 1), (first, first + 2), (first + 1, first + 2))
    ]
    # The features were taken before the images were rounded to bytes.
    found = values["rewards"]["diversity"]["base"]["mean"]
    assert found == pytest.approx(np.mean(expected), abs=0.01)
    assert found > 0.001
    # Their size is measured whatever the rewards are, and numbers are this set's groups.
    sizes = [Image.open(tmp_path / "out" / "images" / "base" / f"{i:04d}.png") for i in range(6)]
    kilobytes = []
    for image in sizes:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        kilobytes.append(len(file.getvalue()) / 1000)
    size = values["rewards"]["jpeg_kilobytes"]["base"]["mean"]
    assert size == pytest.approx(np.mean(kilobytes), abs=1e-6)
    assert set(values["groups"]) <= {"one", "two", "three", "four"}
    assert len(values["groups"]) >= 1


def test_the_table_and_the_report_hold_every_image_and_escape_prompts(capsys, trained, tmp_path):
    folder = tmp_path / "out"
    evil = tmp_path / "prompts.csv"
    evil.write_text('prompt,group\n"<script>alert(1)</script>","<b>g"\n"a, b",x\n', "utf-8")
    code, out, _ = run(capsys, trained, "--prompts", evil, "-n", "2", "-o", folder, "--json")
    assert code == 0
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["base", "base", "tuned", "tuned"]
    assert [row["prompt"] for row in rows[:2]] == ["<script>alert(1)</script>", "a, b"]
    samples = json.loads(out)["samples"]
    for row, sample in zip(rows[2:], samples, strict=True):
        assert (folder / row["file"]).is_file()
        expected = sample["rewards"]["tuned"]["brightness"]
        assert float(row["brightness"]) == pytest.approx(expected, rel=1e-5)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>alert" not in page
    assert "<b>g" not in page
    # Before the scripts, of which Plotly's is full of addresses.
    shown = page.partition("<script")[0]
    assert shown.count('src="data:image/') == 4
    # Nothing is fetched from elsewhere, and the browser is told so.
    assert not re.findall(r'(?:src|href)="(?!data:|images/)', shown)
    assert "default-src 'none'" in shown


def test_a_lora_of_another_model_is_refused(capsys, trained, tmp_path):
    other = small_pipeline(tmp_path / "other", block_out_channels=(16, 32), attention_head_dim=2)
    typed = ("--set", "sample.num_inference_steps=2", "--set", "sample.guidance_scale=2")
    code, _, err = run(capsys, trained, "--model", other, *typed, "-o", tmp_path / "out")
    assert code == 2
    assert "this LoRA was trained on" in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_the_gradient_of_a_preset_need_not_fit_an_evaluation(capsys, tmp_path):
    # tiny has k_max 5; no gradient is taken here.
    fast = ("--set", "sample.num_inference_steps=1", "-n", 1, "--reward", "brightness", "-q")
    code, _, err = run(capsys, "base", "--preset", "tiny", *fast, "-o", tmp_path / "out")
    assert code == 0, err
    # A key that does not exist is still one.
    more = ("--set", "gradient.kk=1", "-o", tmp_path / "other")
    code, _, err = run(capsys, "base", "--preset", "tiny", *fast, *more)
    assert code == 2
    assert "gradient.kk: unknown key" in " ".join(err.split())


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["base"], 2, "--preset"),
        (["RUN", "base"], 2, "the base model is always sampled"),
        (["RUN", "RUN", "--scale", "1"], 2, "--scale goes with one LoRA"),
        (["base", "--scale", "1"], 2, "--scale goes with one LoRA"),
        (["RUN", "--scale", "1,x"], 2, "expected numbers"),
        (["RUN", "--scale", "nan"], 2, "expected finite numbers"),
        (["/none"], 3, "no such file or folder"),
        (["RUN", "--reward", "brightnes"], 2, "Did you mean 'brightness'"),
        (["RUN", "--prompts", "animal"], 2, "Did you mean 'animals'"),
        (["RUN", "--prompts", "none.txt"], 3, "cannot read none.txt"),
        (["RUN", "--set", "sample.etta=1"], 2, "Did you mean 'eta'"),
        (["RUN", "--model", "./none"], 3, "no such file or folder"),
        (["RUN", "--base-until", "0,1.5"], 2, "expected shares from 0 to 1"),
        (["RUN", "--base-until", "0,nan"], 2, "expected finite numbers"),
        (["RUN", "--base-until", "0,1", "--scale", "0,1"], 2, "only one of them may have several"),
        (["base", "--base-until", "0.5", "--preset", "tiny"], 2, "goes with one LoRA, got 0"),
        (["RUN", "--checkpoint", "best"], 3, "there are: step-000001, step-000002"),
        (["RUN", "--checkpoint", "../checkpoints/step-000001"], 3, "has no checkpoint"),
        (["base", "--checkpoint", "1", "--preset", "tiny"], 2, "--checkpoint goes with runs"),
    ],
)
def test_mistakes_are_explained(capsys, trained, tmp_path, args, code, words):
    given = [trained if arg == "RUN" else arg for arg in args]
    found, out, err = run(capsys, *given, "-o", tmp_path / "out")
    assert (found, out) == (code, "")
    assert words in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def geneval_lines(path):
    """Write three lines in the form of GenEval's prompts, and return the file."""
    rows = [
        {"tag": tag, "include": [{"class": "cow", "count": 1}], "prompt": f"a test {tag}"}
        for tag in ("counting", "colors", "position")
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_a_layout_brings_all_prompts_and_the_published_number_of_images(capsys, trained, tmp_path):
    file, folder = geneval_lines(tmp_path / "copy.jsonl"), tmp_path / "out"
    asked = (trained, "--layout", "geneval", "--prompts", file, "-o", folder)
    code, out, err = run(capsys, *asked, "--json")
    assert code == 0, err
    assert "24 images of 16 x 16 pixels, 12 with each of 2 models" in " ".join(err.split())
    assert "published" not in err
    values = json.loads(out)
    assert values["layout"] == str(folder / "geneval")
    assert values["images"] == 12
    assert set(values["groups"]) == {"counting", "colors", "position"}
    for model in ("base", "tuned"):
        for number in range(3):
            place = folder / "geneval" / model / f"{number:05d}"
            line = json.loads((place / "metadata.jsonl").read_text())
            shown = [row for row in values["samples"] if row["prompt"] == line["prompt"]]
            assert len(shown) == len(list((place / "samples").iterdir())) == 4
            for row in shown:
                image = place / "samples" / f"{row['image_index']:04d}.png"
                same = folder / "images" / model / f"{row['number']:04d}.png"
                assert image.read_bytes() == same.read_bytes()
    # Again, with less than all, which is said; the other folder is gone.
    less = (*asked, "--overwrite", "--set", "eval.images_per_prompt=2", "-n", 4)
    code, out, err = run(capsys, *less)
    assert code == 0, err
    assert "4 images of 2 of the 3 prompts" in " ".join(err.split())
    assert "geneval" in out
    assert len(list((folder / "geneval" / "tuned").rglob("*.png"))) == 4


def test_a_layout_with_prompts_of_another_kind_is_refused_before_anything_is_sampled(
    capsys, trained, tmp_path
):
    code, _, err = run(capsys, trained, "--layout", "hpsv2", "-o", tmp_path / "out")
    assert code == 2
    assert "are not of hpd" in err
    code, _, err = run(capsys, trained, "--layout", "geneval3")
    assert code == 2
    # Without --prompts it is the benchmark's own set, which cannot be had here.
    args = ["evaluate", "base", "--config", trained / "config.yaml", "--layout", "geneval2"]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, args), "-o", str(tmp_path / "out")])
    err = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 3
    assert "geneval2_data.jsonl" in err
    assert "set prompts to a local copy" in err
    assert not list(tmp_path.iterdir())
