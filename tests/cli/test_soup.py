"""`alignprop soup` from the command line: the recipe, the result, what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignprop_cli.cli import main
from alignprop_cli.config.schema import ModelConfig
from alignprop_cli.lora import files as adapter
from alignprop_cli.lora import formats
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.factors import Factors
from alignprop_cli.lora.files import LORA_FILE
from alignprop_cli.models.families import open_model
from alignprop_cli.storage import sha256
from tests.factories import fill_lora_b, randn, small_pipeline


def run(capsys, *args):
    """Return the exit code, standard output and standard error of `alignprop soup`."""
    with pytest.raises(SystemExit) as ended:
        main(["soup", *map(str, args)])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def make(folder, seed, *, rank=2, base="f1", width=4, layers=("x.to_q", "y.to_v"), bad=False):
    """Write a LoRA folder with random weights."""
    folder.mkdir()
    made = {}
    for number, name in enumerate(layers):
        down = randn(10 * seed + number, rank, width, dtype=torch.float32)
        made[name] = Factors(down, randn(90 + seed, 6, rank, dtype=torch.float32), rank)
    if bad:
        made[layers[0]].up[0, 0] = float("nan")
    config = {"model": {"id": "tiny"}, "train": {"steps": 3}, "eval": {"images": 2}}
    header = {
        "alignprop.base_fingerprint": base,
        "alignprop.base_model": f"model {base}",
        "alignprop.config": json.dumps(config),
    }
    weights, settings = formats.packed(made)
    adapter.save(folder, weights, header, prefix="unet.", adapter_metadata=settings)
    return folder


def layers_of(folder):
    return adapter.read(folder / LORA_FILE).layers


def test_the_result_is_the_mix_and_says_what_it_is_made_of(capsys, tmp_path):
    a, b = make(tmp_path / "a", 1), make(tmp_path / "b", 2, rank=3)
    out_folder = tmp_path / "mixed"
    code, out, _ = run(capsys, a, b, "--coef", "0.7", "--output", out_folder, "--json")
    values = json.loads(out)
    assert code == 0
    assert values["schema"] == "alignprop.soup/1"
    assert values["ranks"] == [5]
    mixed = adapter.read(out_folder / LORA_FILE)
    for name, factors in mixed.layers.items():
        expected = 0.7 * layers_of(a)[name].delta() + 0.3 * layers_of(b)[name].delta()
        torch.testing.assert_close(factors.delta(), expected, rtol=1e-5, atol=1e-6)
    members = json.loads(mixed.header["alignprop.merged_from"])
    assert [m["coefficient"] for m in members] == pytest.approx([0.7, 0.3])
    assert members[0]["sha256"] == sha256(a / LORA_FILE)
    assert mixed.header["alignprop.base_fingerprint"] == "f1"
    # A soup was not trained.
    kept = json.loads(mixed.header["alignprop.config"])
    assert kept == {"model": {"id": "tiny"}, "eval": {"images": 2}}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_with_base_a_lora_is_scaled_at_its_own_rank(capsys, tmp_path):
    a = make(tmp_path / "a", 1)
    code, out, err = run(capsys, "base", a, "--coef", "1.5", "-o", tmp_path / "less")
    assert code == 0
    assert "of rank 2" in out
    assert "alignprop evaluate" in out
    assert "a share is negative" in err
    for name, factors in layers_of(tmp_path / "less").items():
        expected = -0.5 * layers_of(a)[name].delta()
        torch.testing.assert_close(factors.delta(), expected, rtol=1e-5, atol=1e-6)


def test_a_soup_is_a_member_of_another(capsys, tmp_path):
    a, b = make(tmp_path / "a", 1), make(tmp_path / "b", 2)
    run(capsys, a, b, "-o", tmp_path / "ab")
    code, _, _ = run(capsys, tmp_path / "ab", b, "--coef", "2", "-o", tmp_path / "back")
    assert code == 0
    # 2 (a + b) / 2 - b
    for name, factors in layers_of(tmp_path / "back").items():
        expected = layers_of(a)[name].delta()
        torch.testing.assert_close(factors.delta(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("other", "code", "words"),
    [
        ({"base": "f2"}, 2, "different base models"),
        ({"width": 5}, 2, "is (6, 5) (out, in) here and (6, 4) in the first"),
        ({"layers": ("x.to_q",)}, 2, "only the first has y.to_v"),
        ({"bad": True}, 4, "layer x.to_q holds NaN"),
    ],
    ids=["base", "shape", "layers", "nan"],
)
def test_members_that_cannot_be_mixed_are_refused(capsys, tmp_path, other, code, words):
    a, b = make(tmp_path / "a", 1), make(tmp_path / "b", 2, **other)
    found, out, err = run(capsys, a, b, "-o", tmp_path / "mixed")
    assert (found, out) == (code, "")
    assert words in " ".join(err.split())
    assert not (tmp_path / "mixed").exists()


@pytest.mark.parametrize(
    "shares",
    [
        ["{a}=0.2", "{b}=0.3", "{c}=-1"],
        ["{a}", "{b}", "{c}", "--coef", "0.2,0.3,-1"],
        ["{a}", "{b}", "base", "{c}", "--coef", "0.2,0.3,7,-1"],
    ],
    ids=["equals", "list", "base"],
)
def test_any_number_of_members_is_mixed_with_a_share_for_each(capsys, tmp_path, shares):
    folders = {n: make(tmp_path / n, i, rank=i + 1) for i, n in enumerate("abc")}
    args = [text.format(**folders) for text in shares]
    code, out, err = run(capsys, *args, "-o", tmp_path / "mixed", "--json")
    assert code == 0
    assert json.loads(out)["ranks"] == [6]
    assert "the mix is not an average" in err
    for name, factors in layers_of(tmp_path / "mixed").items():
        deltas = [layers_of(folder)[name].delta() for folder in folders.values()]
        expected = 0.2 * deltas[0] + 0.3 * deltas[1] - deltas[2]
        torch.testing.assert_close(factors.delta(), expected, rtol=1e-5, atol=1e-5)


def test_without_shares_all_members_count_the_same(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [make(tmp_path / name, i) for i, name in enumerate("abc")]
    code, out, _ = run(capsys, *folders, "--json")
    members = json.loads(out)["members"]
    assert code == 0
    assert [m["coefficient"] for m in members] == pytest.approx([1 / 3] * 3)
    assert json.loads(out)["folder"].startswith(str(tmp_path / "soup-a-0.333333-b-0.333333"))


def test_a_lower_rank_is_told_with_what_it_leaves_out(capsys, tmp_path):
    a, b = make(tmp_path / "a", 1), make(tmp_path / "b", 2)
    args = ["--method", "svd", "--rank", "1"]
    code, out, _ = run(capsys, a, b, *args, "-o", tmp_path / "low", "--json")
    assert code == 0
    error = json.loads(out)["error"]
    wrong = total = 0.0
    for name, factors in layers_of(tmp_path / "low").items():
        whole = (layers_of(a)[name].delta() + layers_of(b)[name].delta()) / 2
        wrong += float((factors.delta() - whole).square().sum())
        total += float(whole.square().sum())
        assert factors.rank == 1
    assert error == pytest.approx((wrong / total) ** 0.5, rel=1e-5)
    assert error > 0.01
    _, out, _ = run(capsys, a, b, *args, "-o", tmp_path / "again")
    assert f"leaves out {error:.2%}" in " ".join(out.split())
    header = adapter.read_header(tmp_path / "low" / LORA_FILE)
    recipe = json.loads(header["alignprop.merged_by"])
    assert (recipe["method"], recipe["rank"]) == ("svd", 1)


def test_other_layers_are_mixed_only_when_asked(capsys, tmp_path):
    a, b = make(tmp_path / "a", 1), make(tmp_path / "b", 2, layers=("x.to_q", "z.to_k"))
    code, _, err = run(capsys, a, b, "-o", tmp_path / "mixed")
    assert code == 2
    assert "--allow-missing" in err
    assert run(capsys, a, b, "--allow-missing", "-o", tmp_path / "mixed")[0] == 0
    mixed = layers_of(tmp_path / "mixed")
    assert sorted(mixed) == ["x.to_q", "y.to_v", "z.to_k"]
    expected = 0.5 * layers_of(b)["z.to_k"].delta()
    torch.testing.assert_close(mixed["z.to_k"].delta(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["{a}", "{b}", "--coef", "0.1,0.2,0.7"], "3 shares for 2 members"),
        (["{a}", "{b}", "{b}", "--coef", "0.1"], "1 shares for 3 members"),
        (["{a}=1", "{b}"], "1 of 2 members have a share"),
        (["{a}=1", "{b}=x"], "got 'x'"),
        (["{a}=1", "{b}=1", "--coef", "0.5"], "given twice"),
        (["{a}", "{b}", "--coef", "half"], "got 'half'"),
        (["{a}", "{b}", "--rank", "2"], "method exact has no choice of rank"),
        (["{a}", "{b}", "--method", "svd", "--density", "0.5"], "method svd prunes nothing"),
        (["{a}", "{b}", "--method", "ties", "--density", "0"], "more than 0 and at most 1"),
        (["{a}", "{b}", "--method", "factor"], "rank and scaling are the same"),
        (["{a}", "{b}", "--method", "linear"], "linear"),
        (["{a}", "{b}", "--reward", "clip"], "--reward: nothing is evaluated here"),
        (["{a}", "{b}", "--images", "4"], "--images: nothing is evaluated here"),
        (["{a}", "{b}", "--model", "tiny", "--export", "comfyui"], "or --export merged"),
        (["{a}", "{b}", "--set", "eval.images=4"], "--set: nothing is evaluated here"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(capsys, tmp_path, args, words):
    folders = {"a": make(tmp_path / "a", 1), "b": make(tmp_path / "b", 2, rank=3)}
    filled = [text.format(**folders) for text in args]
    code, out, err = run(capsys, *filled, "-o", tmp_path / "mixed")
    assert (code, out) == (2, "")
    assert words in " ".join(err.replace("\u2502", " ").split())
    assert not (tmp_path / "mixed").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["--coef", "1e308"],
        ["--coef", "1e300", "--method", "factor"],
        ["--coef", "1e308", "--method", "svd", "--rank", "1"],
        ["--sweep", "0:1e308:1e308"],
    ],
)
def test_a_mix_that_is_not_finite_is_refused(capsys, tmp_path, args):
    a, b = make(tmp_path / "a", 1), make(tmp_path / "b", 2)
    code, out, err = run(capsys, a, b, *args, "-o", tmp_path / "mixed")
    assert (code, out) == (4, "")
    assert "too large for float32" in " ".join(err.split())
    # Not even the mixes of a sweep that are finite.
    assert not (tmp_path / "mixed").exists()


def test_what_is_no_plain_lora_is_refused_and_what_is_left_out_is_said(capsys, tmp_path):
    pair = {"x.lora.down.weight": torch.ones(2, 4), "x.lora.up.weight": torch.ones(6, 2)}
    kinds = {
        "dora": ({f"unet.{n}": v for n, v in pair.items()} | {"unet.x.dora_scale": torch.ones(6)}),
        "bare": pair,
        "text": {f"{p}.{n}": v.clone() for p in ("unet", "text_encoder") for n, v in pair.items()},
    }
    for name, state in kinds.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    found = {
        name: run(capsys, tmp_path / f"{name}.safetensors", "base", "-o", tmp_path / f"{name}-mix")
        for name in kinds
    }
    assert {name: code for name, (code, *_) in found.items()} == {"dora": 2, "bare": 3, "text": 0}
    assert "is a DoRA" in found["dora"][2]
    assert "unexpected tensor x.lora.down.weight" in " ".join(found["bare"][2].split())
    assert "its 1 layers of the text encoder are left out" in " ".join(found["text"][2].split())
    assert list(layers_of(tmp_path / "text-mix")) == ["x"]


def test_a_folder_may_have_an_equals_sign_in_its_name(capsys, tmp_path):
    a, b = make(tmp_path / "lr=0.5", 1), make(tmp_path / "b", 2)
    code, out, _ = run(capsys, a, b, "-o", tmp_path / "mixed", "--json")
    assert code == 0
    assert json.loads(out)["members"][0]["name"] == str(a)


def test_missing_members_and_two_bases_are_refused(capsys, tmp_path):
    a = make(tmp_path / "a", 1)
    assert run(capsys, a, tmp_path / "none")[0] == 3
    assert run(capsys, "base", "base")[0] == 2
    assert run(capsys, a, "base", "--coef", "nan")[0] == 2
    (tmp_path / "text.safetensors").write_text("no weights")
    assert run(capsys, a, tmp_path / "text.safetensors", "-o", tmp_path / "mixed")[0] == 3


def test_a_folder_is_replaced_only_when_asked_and_never_with_other_things_in_it(capsys, tmp_path):
    a = make(tmp_path / "a", 1)
    target = tmp_path / "mixed"
    assert run(capsys, a, "base", "-o", target)[0] == 0
    before = (target / LORA_FILE).read_bytes()
    code, _, err = run(capsys, a, "base", "--coef", "0.1", "-o", target)
    assert code == 2
    assert "--overwrite" in err
    assert (target / LORA_FILE).read_bytes() == before
    assert run(capsys, a, "base", "--coef", "0.1", "-o", target, "--overwrite")[0] == 0
    assert (target / LORA_FILE).read_bytes() != before
    (target / "diary.txt").write_text("mine")
    code, _, err = run(capsys, a, "base", "-o", target, "--overwrite")
    assert code == 2
    assert "diary.txt" in err
    assert (target / "diary.txt").read_text() == "mine"


def small_loras(tmp_path):
    """Return two LoRA folders of a small pipeline, and what to type to evaluate their mix."""
    base = small_pipeline(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    config = {
        "model": {"id": str(base)},
        "sample": {"num_inference_steps": 2},
        "reward": {"brightness": {}},
        "eval": {"prompts": str(tmp_path / "prompts.txt"), "images": 2},
    }
    folders = []
    for seed in (1, 2):
        model = open_model(ModelConfig(id=str(base)), [], torch.device("cpu"))
        network = model.network.module
        lora.inject(network, rank=2, alpha=4, target_modules=("to_q", "to_v"), seed=seed)
        fill_lora_b(network, seed=seed, scale=2.0)
        folders.append(tmp_path / f"lora{seed}")
        folders[-1].mkdir()
        header = {
            "alignprop.base_model": str(base),
            "alignprop.base_fingerprint": model.fingerprint,
            "alignprop.config": json.dumps(config),
        }
        adapter.save(
            folders[-1],
            lora.weights(network),
            header,
            prefix=model.family.lora_prefix,
            adapter_metadata=lora.adapter_metadata(network),
        )
    return *folders, ["--model", base, "--set", f"eval.prompts={tmp_path / 'prompts.txt'}"]


@pytest.mark.long
def test_a_sweep_goes_from_one_member_to_the_other(capsys, tmp_path):
    a, b, typed = small_loras(tmp_path)
    folder = tmp_path / "path"
    ask = ["--sweep", "0:1:0.5", "-o", folder, *typed]
    code, out, err = run(capsys, a, b, *ask, "--json")
    assert code == 0, err
    values = json.loads(out)
    assert values["schema"] == "alignprop.evaluate/4"
    names = ["share-0", "share-0.5", "share-1"]
    assert list(values["adapters"]) == names
    assert (folder / "evaluation" / "curve.png").is_file()
    assert "By share of the first member" in (folder / "evaluation" / "report.html").read_text()
    for name, layer in layers_of(folder / "share-0.5").items():
        expected = (layers_of(a)[name].delta() + layers_of(b)[name].delta()) / 2
        torch.testing.assert_close(layer.delta(), expected, rtol=1e-5, atol=1e-6)
    # The ends are the members themselves.
    for end, member in (("share-1", a), ("share-0", b)):
        for name, layer in layers_of(folder / end).items():
            expected = layers_of(member)[name].delta()
            torch.testing.assert_close(layer.delta(), expected, rtol=1e-5, atol=1e-6)
    assert run(capsys, a, b, *ask)[0] == 2
    assert run(capsys, a, b, *ask, "--overwrite", "-n", "1")[0] == 0


def test_a_mix_can_be_evaluated_right_away(capsys, tmp_path):
    a, b, typed = small_loras(tmp_path)
    folder = tmp_path / "mixed"
    args = ["--evaluate", "--reward", "contrast", "-o", folder, *typed]
    code, out, err = run(capsys, a, b, *args)
    assert code == 0, err
    assert "contrast" in out
    assert "0.5 x" in err
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    assert results["adapters"]["tuned"]["sha256"] == sha256(folder / LORA_FILE)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["A", "B", "A", "--sweep", "0:1:0.5"], "two members"),
        (["A", "B", "--sweep", "0:1:0.5", "--coef", "0.5"], "without --coef"),
        (["A", "B", "--sweep", "0:1"], "FROM:TO:STEP"),
        (["A", "B", "--sweep", "1:0:0.5"], "FROM:TO:STEP"),
        (["A", "B", "--sweep", "0:1:x"], "got 'x'"),
        (["A", "B", "--sweep", "0:1:0.0001"], "10001 mixes"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(capsys, tmp_path, args, words):
    folders = {"A": make(tmp_path / "a", 1), "B": make(tmp_path / "b", 2)}
    code, out, err = run(capsys, *[folders.get(arg, arg) for arg in args], "-o", tmp_path / "m")
    assert (code, out) == (2, "")
    assert words in " ".join(err.split())
    assert not (tmp_path / "m").exists()


def test_a_mix_for_comfyui_has_its_names_and_the_same_updates(capsys, tmp_path):
    a, b = make(tmp_path / "a", 1), make(tmp_path / "b", 2, rank=3)
    for name in ("diffusers", "comfyui"):
        code, _, err = run(capsys, a, b, "--format", name, "--output", tmp_path / name)
        assert code == 0, err
    names = set(load_file(tmp_path / "comfyui" / LORA_FILE))
    assert {f"lora_unet_x_to_q.{part}" for part in ("lora_down.weight", "alpha")} <= names
    # These toy layers are none of a network, so they are compared by the tensors.
    found = load_file(tmp_path / "comfyui" / LORA_FILE)
    for name, factors in layers_of(tmp_path / "diffusers").items():
        flat = f"lora_unet_{name.replace('.', '_')}"
        down, up = (found[f"{flat}.lora_{half}.weight"] for half in ("down", "up"))
        scaling = float(found[f"{flat}.alpha"]) / len(down)
        torch.testing.assert_close((scaling * up.double() @ down.double()), factors.delta())
    header = adapter.read_header(tmp_path / "comfyui" / LORA_FILE)
    assert header["alignprop.base_model"] == "model f1"
