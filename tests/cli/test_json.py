"""What `--json` prints fits the schemas of docs/schemas/, which users may rely on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from alignprop_cli.cli import main
from tests.schemas import FOLDER, schemas, text

jsonschema = pytest.importorskip("jsonschema")

QUICK = (
    *("--set=sample.num_inference_steps=2", "--set=gradient.k_max=2"),
    *("--set=train.batch_size=2", "--set=train.micro_batch=2"),
    *("--set=eval.images=2", "--set=eval.sample_images=2", "--set=eval.every=0"),
)


@pytest.fixture
def printed(capsys, tmp_path, monkeypatch):
    """Return a function that runs a command, checks its object, and returns it."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--json"])
        streams = capsys.readouterr()
        assert not ended.value.code, streams.err
        found = json.loads(streams.out)
        file = FOLDER / f"{found['schema'].replace('/', '.')}.json"
        schema = json.loads(file.read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator(schema).validate(found)
        return found

    return call


def test_the_files_are_up_to_date() -> None:
    made = schemas()
    assert sorted(made) == sorted(file.name for file in FOLDER.glob("*.json"))
    for name, schema in made.items():
        jsonschema.Draft202012Validator.check_schema(schema)
        written = (FOLDER / name).read_text(encoding="utf-8")
        assert written == text(schema), f"{name}: write it with python -m tests.schemas"


def test_an_unknown_key_or_a_missing_one_does_not_fit() -> None:
    """The schemas are closed, or a test that an object fits could hardly fail."""
    for name, schema in schemas().items():
        assert schema["additionalProperties"] is False, name
        required = set(schema["properties"]) - {
            "ema_adapter",
            "exports",
            "hub",
            "layout",
            "output",
            "sheet",
            "report",
            "images",
        }
        assert required <= {*schema["required"], "images"}, name


def test_presets_and_configurations_fit(printed) -> None:
    assert "tiny" in printed("train", "--list-presets")["presets"]
    for preset in ("tiny", "hps"):
        printed("train", "--preset", preset, "--show-preset")


@pytest.mark.long
def test_every_result_fits(printed) -> None:
    assert printed("train", "--preset", "tiny", "--dry-run", *QUICK)["times"] is None
    card = printed("train", "--preset", "tiny", "--dry-run", *QUICK, "--gpu", "rtx4090")
    assert card["times"]["call"]["launch"] >= 0.0
    cards = printed("train", "--preset", "tiny", "--dry-run", *QUICK, "--gpu-memory=1MB,8GB")
    assert [each["plan"] is None for each in cards["plans"]] == [True, False]
    ema = ("--set=train.ema_decay=0.9", "--steps=1", "--output=r", "--quiet")
    trained = printed("train", "--preset", "tiny", *QUICK, *ema, "--export=comfyui")
    assert trained.keys() >= {"ema_adapter", "card", "exports"}
    sampled = ("--quiet", "--set=sample.num_inference_steps=1", "--images=2")
    given = ("--images-per-prompt=2", "--export=comfyui")
    found = printed("evaluate", "r", *sampled, "--output=e", *given)
    assert found["rewards"]["clip"]["tuned"].keys() >= {"mean", "std", "difference", "wins"}
    printed("soup", "r", "base", "--coef=0.5", "--output=s", "--quiet", "--export=comfyui")
    svd = printed("soup", "r", "r", "--method=svd", "--rank=2", "--output=svd", "--quiet")
    assert svd["error"] is not None
    printed("soup", "r", "base", "--sweep=0:1:1", "--output=sweep", *sampled)
    scored = printed("score", "e/images", "--reward=brightness", "--quiet")
    assert scored["images"][0].keys() >= {"file", "prompt", "brightness"}
