"""`alignprop_cli.train` and the others: what the commands do, in somebody else's process."""

from __future__ import annotations

import hashlib
import html
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled

import alignprop_cli
from alignprop_cli import (
    AssetError,
    ConfigError,
    InterruptedRun,
    NothingToDo,
    Progress,
    RunError,
    cli,
)
from alignprop_cli.api.process import KeptConsole, guest
from alignprop_cli.device import allow_tf32, hold_memory
from alignprop_cli.rewards.pixel import brightness
from tests.factories import picture
from tests.publishing.fake_hub import TOKEN, running

# The smallest run there is: two steps, each of one image through one call.
SMALL: dict[str, Any] = {
    "sample.num_inference_steps": 1,
    "gradient.k_max": 1,
    "train.batch_size": 1,
    "train.micro_batch": 1,
    "eval.images": 1,
    "eval.sample_images": 1,
    "eval.sample_images_per_prompt": 1,
    "eval.rewards": {},
}
TYPED = [f"--set={key}={json.dumps(value)}" for key, value in SMALL.items()]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def blueness(images, prompts):
    return images[:, 2].mean(dim=(1, 2))


class Redness:
    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def __call__(self, images, prompts):
        return self.gain * images[:, 0].mean(dim=(1, 2))


def command(*args: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(map(str, args)))
    return int(ended.value.code or 0)


def state() -> dict[str, Any]:
    """Return what a call could leave changed."""
    noise = np.random.get_state()  # noqa: NPY002
    return {
        "cwd": Path.cwd(),
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in SIGNALS],
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fills": torch.utils.deterministic.fill_uninitialized_memory,
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        "seeds": (random.getstate(), noise[1].tolist(), torch.get_rng_state().tolist()),
        "warnings": list(warnings.filters),
        "recursion": sys.getrecursionlimit(),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "bars": transformers.utils.logging.is_progress_bar_enabled(),
        "streams": (sys.stdout, sys.stderr),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with the run `typed`, which the command made."""
    folder = tmp_path_factory.mktemp("api")
    args = ["train", "--preset", "tiny", "--reward", "brightness", "--steps", 2, "--quiet"]
    assert command(*args, "--output", folder / "typed", *TYPED) == 0
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running() as found:
        # Read when the library is imported, so the variables of the environment come too late.
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def test_train_is_the_command_and_leaves_the_process_as_it_was(place, capfd) -> None:
    # A caller who computes in another precision, and without gradients.
    torch.manual_seed(7)
    random.seed(7)
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float64)
    transformers.utils.logging.enable_progress_bar()
    seen: list[Progress] = []
    try:
        with torch.inference_mode():
            before = state()
            made = alignprop_cli.train(
                "tiny",
                reward="brightness",
                steps=2,
                output=place / "called",
                overrides=SMALL,
                progress=seen.append,
            )
            after = state()
    finally:
        torch.use_deterministic_algorithms(True)
        torch.set_default_dtype(torch.float32)
    assert after == before
    assert capfd.readouterr() == ("", "")

    typed = json.loads((place / "typed" / "summary.json").read_text())
    assert made.adapter.read_bytes() == Path(typed["adapter"]).read_bytes()
    assert asdict(made.rewards["brightness"]) == typed["held_out"]["rewards"]["brightness"]
    assert {k: asdict(v) for k, v in made.checker.items()} == typed["held_out"]["checker"]
    assert (made.run, made.steps, made.images_seen) == (place / "called", 2, 2)
    assert made.values.keys() == typed.keys()
    assert made.sheet.is_file()
    assert [p.done for p in seen if p.stage == "training"] == [0, 1, 2]
    assert {p.stage for p in seen} == {"base model", "training", "tuned model"}
    with pytest.raises(FrozenInstanceError):
        made.steps = 3  # type: ignore[misc]


def called(function: Any, *args: Any, **options: Any) -> Any:
    """Call a function, and look whether it has changed anything."""
    # Around the call alone: the commands, which the same tests run, own their process.
    before = state()
    found = function(*args, **options)
    assert state() == before
    return found


def test_evaluate_soup_and_score_are_the_commands(place, capfd) -> None:
    run = place / "typed"
    # 1. evaluate
    made = called(alignprop_cli.evaluate, run, images=2, scale=[0, 1], output=place / "e", seed=3)
    args = ("evaluate", run, "--images", 2, "--scale", "0,1", "--seed", 3, "--quiet")
    assert command(*args, "--output", place / "e2", "--json") == 0
    typed = json.loads(capfd.readouterr().out)
    differ = {k for k, v in made.values.items() if v != typed[k]}
    assert differ <= {"seconds", "output", "sheet", "report"}
    assert made.rewards["brightness"]["strength 1"].paired is not None
    assert made.rewards["brightness"]["base"].paired is None
    # A LoRA of strength 0 is the base model.
    same = made.rewards["brightness"]["strength 0"].paired
    assert same is not None
    assert (same.difference, same.ties) == (0.0, 1.0)
    assert made.results.is_file()

    # 2. soup
    soup = called(alignprop_cli.soup, {run: 0.25, "base": 0.75}, output=place / "s")
    args = ("soup", run, "base", "--coef", "0.25", "--output", place / "s2", "--json")
    assert command(*args) == 0
    typed = json.loads(capfd.readouterr().out)
    assert soup.adapter is not None
    assert soup.adapter.read_bytes() == Path(typed["adapter"]).read_bytes()
    assert (soup.folder, soup.error, soup.evaluation) == (place / "s", 0.0, None)
    assert soup.values.keys() | {"schema"} == typed.keys()
    sweep = {"sweep": (0, 1, 1), "images": 1, "output": place / "w"}
    swept = called(alignprop_cli.soup, [run, "base"], **sweep)
    assert (swept.folder, swept.adapter) == (place / "w", None)
    assert swept.evaluation is not None
    assert set(swept.evaluation.rewards["brightness"]) == {"base", "share-0", "share-1"}

    # 3. score
    images = made.output / "images" / "base"
    scored = called(alignprop_cli.score, images, reward="brightness", top=1)
    assert command("score", images, "--reward", "brightness", "--top", 1, "--json") == 0
    typed = json.loads(capfd.readouterr().out)
    assert {**scored.values, "schema": "alignprop.score/3"} == typed
    # The files hold bytes, so each value is rounded.
    mean = made.rewards["brightness"]["base"].mean
    assert scored.rewards["brightness"].mean == pytest.approx(mean, abs=1 / 255)
    assert [row["file"].parent for row in scored.images] == [images]
    assert capfd.readouterr() == ("", "")


def test_exports_trackers_and_the_hub_are_asked_for_as_at_the_command_line(
    place, hub, monkeypatch
) -> None:
    # The hub's bars too, which are switched off with these.
    transformers.utils.logging.enable_progress_bar()
    before, run = state(), place / "typed"
    # What is not there is refused as the command refuses it, before anything is sampled.
    calls: list[tuple[type[Exception], str, Any]] = [
        (ConfigError, "unknown format 'comfy'", {"export": "comfy"}),
        (ConfigError, "export: expected a name, got 3", {"export": [3]}),
        (ConfigError, "tracking.log_with", {"log_with": "tensorbord"}),
    ]
    for kind, said, options in calls:
        with pytest.raises(kind) as told:
            alignprop_cli.evaluate(run, images=1, output=place / "never", **options)
        assert said in str(told.value)
    with pytest.raises(ConfigError, match="--log-with goes with"):
        alignprop_cli.soup([run, "base"], coef=0.5, output=place / "never", log_with="wandb")
    assert not (place / "never").exists()

    # A run with a Python object as its reward, whose card says what is known of it.
    made = alignprop_cli.train(
        "tiny",
        reward=blueness,
        steps=1,
        overrides=SMALL,
        export="comfyui",
        push_to_hub="me/blue",
        output=place / "given",
    )
    assert list(made.exports) == ["comfyui"]
    assert made.exports["comfyui"].is_file()
    assert made.hub == f"{hub.url}/me/blue"
    assert made.card == made.adapter.with_name("README.md")
    for text in (made.card.read_text(), hub.repos["me/blue"]["README.md"].decode()):
        assert "`python:blueness`: a reward of its user's own" in text
        assert "`python:blueness` (trained on)" in text
        assert str(place) not in text

    judged = alignprop_cli.evaluate(
        made.run, reward="brightness", images=1, export=["comfyui"], output=place / "exported"
    )
    assert judged.exports["comfyui"].parent == place / "exported" / "export" / "comfyui"
    mixed = alignprop_cli.soup(
        {run: 0.5, "base": 0.5}, export=("comfyui",), push_to_hub="me/mix", output=place / "mix"
    )
    assert mixed.exports["comfyui"].is_file()
    assert mixed.hub == f"{hub.url}/me/mix"
    assert not are_progress_bars_disabled()
    assert state() == before

    # What is missing for an upload is told before anything is mixed.
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AssetError, match="there is no token"):
        alignprop_cli.soup([run], push_to_hub="me/mix", output=place / "never")
    assert not (place / "never").exists()


def test_prompts_are_read_before_anything_is_sampled_and_keep_their_own_groups(tmp_path) -> None:
    file, folder = tmp_path / "prompts.csv", tmp_path / "out"
    file.write_text("prompt,group\none red circle,a\none red circle,b\n", encoding="utf-8")
    read = hashlib.sha256(file.read_bytes()).hexdigest()
    judged = alignprop_cli.evaluate(
        "base",
        preset="tiny",
        prompts=file,
        reward="brightness",
        images=2,
        overrides={"sample.num_inference_steps": 1},
        output=folder,
        # It is gone when the images are there.
        progress=lambda done: file.unlink(missing_ok=True),
    )
    assert not file.exists()
    values = json.loads(judged.results.read_text("utf-8"))
    assert values["prompt_files"] == {str(file): read}
    assert [sample["group"] for sample in values["samples"]] == ["a", "b"]
    means = {g: of["brightness"]["base"]["mean"] for g, of in values["groups"].items()}
    own = [sample["rewards"]["base"]["brightness"] for sample in values["samples"]]
    assert means == {"a": own[0], "b": own[1]}


def test_a_run_in_a_thread_with_an_object_as_its_reward_is_resumed_with_it(place) -> None:
    found: list[Any] = []
    before = state()

    def work() -> None:
        found.append(
            alignprop_cli.train(
                config={"extends": "tiny", "train": {"steps": 1}},
                reward={Redness: 1.0, blueness: -0.5},
                output=place / "own",
                overrides={**SMALL, "reward.python:Redness.gain": 2.0, "output.save_every": 1},
            )
        )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert state() == before
    assert list(found[0].rewards)[:2] == ["python:Redness", "python:blueness"]
    # What it says one can do next can be done: no command line could.
    call = f"alignprop_cli.evaluate({str(place / 'own')!r}, reward=[Redness, blueness])"
    assert found[0].values["next"] == call
    page = html.unescape((place / "own" / "report.html").read_text(encoding="utf-8"))
    assert f"alignprop_cli.train(resume={str(place / 'own')!r}, steps=2, reward=[" in page
    assert "alignprop evaluate" not in page
    assert "alignprop train" not in page

    # Its folder cannot name them: whoever comes next is told, from Python and at the command line.
    for call in (
        lambda: alignprop_cli.train(resume=place / "own", steps=2),
        lambda: alignprop_cli.evaluate(place / "own"),
        lambda: alignprop_cli.evaluate(found[0].adapter),
    ):
        with pytest.raises(ConfigError, match="python:Redness was a Python object") as told:
            call()
        assert "reward=Redness" in str(told.value.hint)
    assert command("evaluate", place / "own") == 2

    again = alignprop_cli.train(resume=place / "own", steps=2, reward=[Redness, blueness])
    assert again.steps == 2
    with pytest.raises(NothingToDo):
        alignprop_cli.train(resume=place / "own", steps=2, reward=[Redness, blueness])
    # The class is built with the option that the run records; an object is built already.
    judged = alignprop_cli.evaluate(place / "own", reward=[Redness, brightness], images=1)
    assert list(judged.rewards)[:2] == ["python:Redness", "python:brightness"]
    base, recorded = judged.rewards["python:Redness"]["base"], found[0].rewards["python:Redness"]
    assert base.mean == recorded.base
    with pytest.raises(ConfigError, match=r"is an object and takes no options, got {'gain': 2\.0}"):
        alignprop_cli.evaluate(place / "own", reward=Redness(), overwrite=True)


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="before torch 2.9")
def test_a_caller_may_set_the_precision_in_either_way() -> None:
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    places = (cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [place.fp32_precision for place in places]
    try:
        # torch cannot tell the older settings of these, and raises when it is asked.
        for place, value in zip(places, ("tf32", "tf32", "ieee"), strict=True):
            place.fp32_precision = value
        with guest({}):
            allow_tf32(torch.float32)
            assert torch.get_float32_matmul_precision() == "highest"
            assert cudnn.allow_tf32 is False
        assert [place.fp32_precision for place in places] == ["tf32", "tf32", "ieee"]
    finally:
        torch.set_float32_matmul_precision("highest")
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


@pytest.mark.parametrize("begun", [True, False])
def test_a_limit_on_the_memory_of_a_gpu_ends_with_its_call(begun: bool, monkeypatch) -> None:
    """On a GPU that is not here: a later call in the same process would run out of memory."""
    share = [0.8 if begun else 1.0]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: begun)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 10 * 2**30))
    get = "get_per_process_memory_fraction"  # not in every torch
    monkeypatch.setattr(torch.cuda, get, lambda: share[-1], raising=False)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda part, index=None: share.append(part)
    )
    with guest({}):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        hold_memory(torch.device("cuda:0"), 4 * 2**30)
        assert share[-1] < 0.4
    assert share[-1] == share[0]


def test_ctrl_c_finishes_the_step_and_saves(place) -> None:
    before = state()

    def interrupt(progress: Progress) -> None:
        if (progress.stage, progress.done) == ("training", 1):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRun, match="after step 1; it is saved") as ended:
        alignprop_cli.train(
            "tiny",
            reward="brightness",
            output=place / "stopped here",
            overrides=SMALL,
            export=["comfyui"],
            progress=interrupt,
        )
    assert ended.value.exit_code == 130
    # The line to type, for a shell: with what else was asked for.
    line = f"alignprop train --resume '{place / 'stopped here'}' --export comfyui"
    assert ended.value.hint == f"resume with: {line}"
    assert (place / "stopped here" / "checkpoints" / "step-000001").is_dir()
    assert state() == before
    # What the callback raises ends the run as well, and the handlers are put back.
    with pytest.raises(ZeroDivisionError):
        alignprop_cli.train(resume=place / "stopped here", progress=lambda progress: 1 / 0)
    assert state() == before


def test_mistakes_are_exceptions_of_the_documented_classes(place, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = place / "typed"
    before = state()
    for kind, said, call in [
        (ConfigError, "unknown preset 'tny'", lambda: alignprop_cli.train("tny")),
        (ConfigError, "format 'x'", lambda: alignprop_cli.train("tiny", export="x")),  # type: ignore
        (ConfigError, "nothing to do", lambda: alignprop_cli.train()),
        (
            ConfigError,
            "train.stepz",
            lambda: alignprop_cli.train("tiny", overrides={"train.stepz": 1}),
        ),
        (
            ConfigError,
            "reward.x: an object of Redness can be in no configuration",
            lambda: alignprop_cli.train("tiny", overrides={"reward.x": Redness()}),
        ),
        (ConfigError, "extends", lambda: alignprop_cli.train(config={"extends": 3})),
        (ConfigError, "sizes", lambda: alignprop_cli.train("tiny", config={"sizes": {}})),
        (ConfigError, "no name", lambda: alignprop_cli.train("tiny", reward=3)),  # type: ignore
        (ConfigError, "exists and is not", lambda: alignprop_cli.train("tiny", output=run)),
        (AssetError, "is not a run", lambda: alignprop_cli.train(resume=tmp_path)),
        (AssetError, "nowhere", lambda: alignprop_cli.evaluate("nowhere")),
        (ConfigError, "expected at least one", lambda: alignprop_cli.evaluate([])),
        (ConfigError, "weights are for", lambda: alignprop_cli.evaluate(run, reward={"clip": 1})),
        (ConfigError, "images", lambda: alignprop_cli.evaluate(run, images=0)),
        (ConfigError, "unknown 'exakt'", lambda: alignprop_cli.soup([run], method="exakt")),  # type: ignore
        (ConfigError, "given twice", lambda: alignprop_cli.soup({run: 1.0}, coef=1.0)),
        (ConfigError, "top: expected at least 1", lambda: alignprop_cli.score(".", top=0)),
        (AssetError, "nowhere.png", lambda: alignprop_cli.score("nowhere.png")),
    ]:
        with pytest.raises(kind) as told:
            call()
        if said != "no name":
            assert said in str(told.value), (said, str(told.value))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(RunError, match="nothing was measured"):
        alignprop_cli.score(tmp_path / "broken.png", reward="brightness")
    assert state() == before


def test_warnings_are_in_the_report_of_a_run_whether_they_are_printed_or_not(capfd) -> None:
    for verbose in (False, True):
        console = KeptConsole(verbose=verbose, progress=None)
        console.warn("too hot")
        # What report.html shows, and what the caller gets.
        assert (console.warned, console.warnings) == (["too hot"], ["too hot"])
        assert ("too hot" in capfd.readouterr().err) is verbose


def test_what_the_command_warns_of_is_in_the_result_and_verbose_prints_it(tmp_path, capfd) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    found = alignprop_cli.score(tmp_path, reward=[blueness], prompt="a cat")
    assert list(found.skipped) == [tmp_path / "b.png"]
    [warning] = found.warnings
    assert "skipped" in warning
    assert capfd.readouterr() == ("", "")
    alignprop_cli.score(tmp_path, reward=[blueness], prompt="a cat", verbose=True)
    out, err = capfd.readouterr()
    assert "python:blueness" in out
    assert warning in " ".join(err.split())


def test_importing_the_package_loads_nothing_and_is_quick() -> None:
    code = (
        "import sys, time\n"
        "started = time.process_time()\n"
        "import alignprop_cli\n"
        "print(time.process_time() - started)\n"
        "alignprop_cli.train, alignprop_cli.load_reward, alignprop_cli.ConfigError\n"
        "print(*{'torch', 'diffusers', 'numpy'} & {*sys.modules})\n"
        "assert {*alignprop_cli.__all__} <= {*dir(alignprop_cli)}, dir(alignprop_cli)\n"
    )
    # Of the processor, since the clock's depend on what else runs.
    seconds: list[float] = []
    while len(seconds) < 5 and not any(one < 0.1 for one in seconds):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        taken, loaded = done.stdout.splitlines()
        assert loaded == ""
        seconds.append(float(taken))
    assert min(seconds) < 0.1, f"import alignprop_cli took {seconds} s"


def test_every_documented_name_is_there() -> None:
    for name in alignprop_cli.__all__:
        assert getattr(alignprop_cli, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        alignprop_cli.trainer  # noqa: B018
