"""`--push-to-hub`, against a hub on this machine: what arrives there, and what is told if not."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors import safe_open
from safetensors.torch import load_file

from alignprop_cli.cli import main
from alignprop_cli.errors import AssetError, ConfigError
from alignprop_cli.lora import files, formats
from alignprop_cli.lora.factors import Factors
from alignprop_cli.lora.files import LORA_FILE
from alignprop_cli.publishing import card, push
from alignprop_cli.publishing.request import Request
from alignprop_cli.publishing.results import catch_up, publish
from tests.factories import randn
from tests.publishing.fake_hub import TOKEN, Hub, running

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running() as hub:
        # Read when the library is imported, so the variables of the environment come too late.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        # Whatever happens.
        assert TOKEN not in captured.out + captured.err
        code: Any = ended.value.code
        return code or 0, captured.out, captured.err

    return call


def member(folder: Path) -> Path:
    """Write a LoRA whose header names files of this machine."""
    folder.mkdir()
    layers = {"mid_block.attentions.0.proj_in": Factors(randn(1, 2, 3), randn(2, 4, 2), 2.0)}
    layers = {n: Factors(f.down.float(), f.up.float(), f.alpha) for n, f in layers.items()}
    config = {"model": {"id": "/data/secret/model"}, "sample": {"num_inference_steps": 7}}
    header = {
        "alignprop.base_model": "/data/secret/model",
        "alignprop.base_fingerprint": "f1",
        "alignprop.rewards": "clip,/data/secret/own.py:Reward",
        "alignprop.config": json.dumps(config),
    }
    weights, settings = formats.packed(layers)
    files.save(folder, weights, header, prefix="unet.", adapter_metadata=settings)
    return folder


def test_adapter_and_card_arrive_and_nothing_of_this_machine(
    run: Run, hub: Hub, tmp_path: Path
) -> None:
    a = member(tmp_path / "secret-a")
    out = tmp_path / "mix"
    command = ("soup", a, "base", "--coef=0.5", "--push-to-hub=me/mix", "--output", out, "--json")
    code, said, err = run(*command)
    assert code == 0, err
    assert json.loads(said)["hub"] == f"{hub.url}/me/mix"
    assert hub.private == {"me/mix": True}
    arrived = hub.repos["me/mix"]
    assert set(arrived) == {".gitattributes", LORA_FILE, "README.md"}
    # The same weights as in the file on this machine, and a header that names no file.
    (tmp_path / "arrived.safetensors").write_bytes(arrived[LORA_FILE])
    mine, theirs = load_file(out / LORA_FILE), load_file(tmp_path / "arrived.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with safe_open(tmp_path / "arrived.safetensors", "pt") as opened:
        header = opened.metadata()
    assert header["alignprop.base_fingerprint"] == "f1"
    assert "lora_adapter_metadata" in header
    for data in arrived.values():
        for secret in (b"/data", str(tmp_path).encode(), TOKEN.encode()):
            assert secret not in data
    card = ModelCard(arrived["README.md"].decode())
    assert card.data.base_model is None
    assert 'load_lora_weights("me/mix")' in card.text
    assert "`own.py:Reward`: a reward of its user's own" in card.text
    # What was uploaded can be looked at, and is replaced by the next time.
    assert (out / "hub" / "README.md").read_bytes() == arrived["README.md"]
    code, _, err = run(*command, "--overwrite")
    assert code == 0, err
    assert not [path for path in out.rglob("*") if TOKEN.encode() in _bytes(path)]


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def test_without_a_token_nothing_is_begun(
    run: Run, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    a = member(tmp_path / "a")
    code, out, err = run("soup", a, "--push-to-hub=me/mix", "--output", tmp_path / "mix")
    assert (code, out) == (3, "")
    assert "there is no token of the hub" in err
    assert "hf auth login" in err
    assert not (tmp_path / "mix").exists()
    assert hub.asked == []


def test_a_wrong_token_is_told_before_anything_is_begun(
    run: Run, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    a = member(tmp_path / "a")
    code, out, err = run("soup", a, "--push-to-hub=me/mix", "--output", tmp_path / "mix")
    assert (code, out) == (3, "")
    assert "does not take this token (401)" in err
    assert "hf_another" not in err
    assert not (tmp_path / "mix").exists()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"gated": True}, "gated for this token"),
        ({"repos": {"me/mix": {"model.safetensors": b""}}}, "holds 'model.safetensors'"),
    ],
    ids=["gated", "foreign"],
)
def test_a_repository_that_cannot_be_written_to_is_refused_first(
    hub: Hub, state: dict[str, Any], words: str
) -> None:
    vars(hub).update(state)
    kind = AssetError if "gated" in state else ConfigError
    with pytest.raises(kind, match=words):
        push.check("me/mix")
    # By the name alone it is one's own.
    with pytest.raises(kind, match=words):
        push.check("mix")


def test_a_repository_with_an_earlier_adapter_is_updated(hub: Hub, tmp_path: Path) -> None:
    hub.repos["me/mix"] = {".gitattributes": b"", LORA_FILE: b"old", "README.md": b"old"}
    push.check("me/mix")
    (tmp_path / LORA_FILE).write_bytes(b"new")
    assert push.upload("me/mix", tmp_path) == f"{hub.url}/me/mix"
    assert hub.repos["me/mix"][LORA_FILE] == b"new"
    assert hub.private == {}  # its visibility is left alone


def test_what_is_no_id_is_refused(hub: Hub) -> None:
    for name in ("a/b/c", "me/a b", "me/", "x" * 200):
        with pytest.raises(ConfigError, match="is no id of the hub") as raised:
            push.check(name)
        assert raised.value.hint == "expected OWNER/NAME"
    assert hub.asked == []


@pytest.mark.parametrize("how", ["refuses", "stops"])
def test_the_result_stays_where_the_upload_fails(
    run: Run, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    hub.refuses_commits = True
    if how == "stops":
        # The network is gone between the first question and the upload.
        upload = push.upload

        def late(hub_id: str, folder: Path) -> str:
            hub.stop()
            return upload(hub_id, folder)

        monkeypatch.setattr(push, "upload", late)
    a, out = member(tmp_path / "a"), tmp_path / "mix"
    code, said, err = run("soup", a, "--push-to-hub=me/mix", "--output", out, "--json")
    assert code == 3
    words = "may not write there (403)" if how == "refuses" else "the hub cannot be reached"
    assert words in err
    # The result is shown and whole, and what was to be uploaded is there with the way to do it.
    assert json.loads(said)["adapter"] == str((out / LORA_FILE).resolve())
    assert f"hf upload me/mix {out / 'hub'} . --private" in " ".join(err.split())
    assert files.read(out / LORA_FILE).layers
    assert {path.name for path in (out / "hub").iterdir()} == {LORA_FILE, "README.md"}


def test_offline_mode_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError, match="HF_HUB_OFFLINE is set"):
        push.check("me/mix")


def test_an_upload_that_failed_is_made_up_for_by_the_same_request(hub: Hub, tmp_path: Path) -> None:
    """What `train --resume` of a run does that has all its steps."""
    a, out = member(tmp_path / "a"), tmp_path / "run"
    about = card.of_soup("r", {}, [("a", 1.0)], ["clip"], "exact", {}, None)
    asked = Request(hub_id="me/r")
    hub.refuses_commits = True
    first = publish(asked, a / LORA_FILE, None, out, "r", about)
    assert isinstance(first.failure, AssetError)
    # It still fails, with the way to do it by hand.
    with pytest.raises(AssetError, match=r"may not write there \(403\)") as told:
        catch_up(asked, out, dora=False)
    assert f"hf upload me/r {out / 'hub'} . --private" in str(told.value.hint)
    hub.refuses_commits = False
    again = catch_up(asked, out, dora=False)
    assert again.values == {"hub": f"{hub.url}/me/r"}
    assert set(hub.repos["me/r"]) == {".gitattributes", LORA_FILE, "README.md"}
    # Once it is there nobody is asked again.
    hub.asked.clear()
    assert catch_up(asked, out, dora=False).values == {}
    assert not hub.asked
    # Nor is anything done for who asks for nothing, or for something else.
    assert catch_up(Request(), out, dora=False).values == {}
    (out / "checkpoints" / "step-000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="lacks what --push-to-hub me/other asks for"):
        catch_up(Request(hub_id="me/other"), out, dora=False)


@pytest.mark.long
def test_a_run_is_kept_whatever_the_hub_does(
    run: Run, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refuses_commits = True
    settings = ("train.batch_size=8", "eval.images=2", "eval.every=0", "output.save_every=0")
    given = [f"--set={one}" for one in settings]
    out = tmp_path / "r"
    push_to = ("--push-to-hub=me/r", "--export=comfyui", "--json")
    code, said, err = run(
        "train", "--preset=tiny", "--steps=1", *given, f"--output={out}", *push_to
    )
    assert code == 3
    assert "may not write there (403)" in err
    values = json.loads(said)
    assert files.read(Path(values["adapter"])).layers
    assert Path(values["exports"]["comfyui"]).is_file()
    assert f"hf upload me/r {out / 'hub'} . --private" in " ".join(err.split())
    # The line of a scheduler again: it does what is missing, and then finds everything done.
    hub.refuses_commits = False
    line = ("train", "--preset=tiny", "--steps=1", *given, f"--output={out}", *push_to)
    code, said, err = run(*line, "--resume=auto")
    assert code == 0, err
    again = json.loads(said)
    assert again["hub"] == f"{hub.url}/me/r"
    assert again["adapter"] == values["adapter"]
    code, said, err = run(*line, "--resume=auto")
    assert (code, said) == (0, "")
    assert "nothing to do" in err
    arrived = hub.repos["me/r"]
    assert set(arrived) == {".gitattributes", LORA_FILE, "README.md", "before_after.png"}
    assert "](before_after.png)" in arrived["README.md"].decode()
    assert "](../../before_after.png)" in Path(values["card"]).read_text()
    assert io.BytesIO(arrived["before_after.png"]).read(4) == b"\x89PNG"
