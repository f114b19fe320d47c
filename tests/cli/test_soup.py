"""`alignprop soup` from the command line: the recipe, the result, what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from alignprop_cli import adapter
from alignprop_cli.cli import main
from alignprop_cli.models.base import LORA_FILE
from alignprop_cli.soup import Factors
from tests.factories import randn


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
        made[name] = Factors(down, randn(90 + seed, 6, rank, dtype=torch.float32), 1.0)
    if bad:
        made[layers[0]].up[0, 0] = float("nan")
    config = {"model": {"id": "tiny"}, "train": {"steps": 3}, "eval": {"images": 2}}
    header = {
        "alignprop.base_fingerprint": base,
        "alignprop.base_model": f"model {base}",
        "alignprop.config": json.dumps(config),
    }
    adapter.write(folder, made, header)
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
    assert members[0]["sha256"] == adapter.sha256(a / LORA_FILE)
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
    assert "outside 0 to 1" in err
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
        ({"width": 5}, 2, "layer x.to_q is (6, 5)"),
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


def test_missing_members_and_two_bases_are_refused(capsys, tmp_path):
    a = make(tmp_path / "a", 1)
    assert run(capsys, a, tmp_path / "none")[0] == 3
    assert run(capsys, "base", "stablediffusion")[0] == 2
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
