"""What came with weights runs no code and reads nothing that is not shipped, unless it is typed."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from alignprop_cli.cli import main
from alignprop_cli.commands import recorded
from alignprop_cli.commands.typed import refuse_untyped
from alignprop_cli.config import presets, trust
from alignprop_cli.config.schema import Config, ModelConfig
from alignprop_cli.config.validation import parse
from alignprop_cli.errors import ConfigError
from alignprop_cli.lora import files
from alignprop_cli.lora import layers as lora
from alignprop_cli.lora.files import LORA_FILE
from alignprop_cli.models.families import open_model
from alignprop_cli.models.published import PUBLISHED
from alignprop_cli.rewards import registry
from alignprop_cli.shipped import next_command, shipped_names
from alignprop_cli.training import checkpoint

EVIL = """
from pathlib import Path

Path("pwned").touch()

def r(images, prompts):
    return images.mean(dim=(1, 2, 3))

class R:
    def __init__(self, gain=1.0, file=""):
        Path("pwned").touch()

    def __call__(self, images, prompts):
        return images.mean(dim=(1, 2, 3))
"""
POPEN = {"subprocess:Popen": {"weight": 1.0, "args": ["touch", "pwned"]}}
TYPE = "name it yourself: "
SHORT = {"sample": {"num_inference_steps": 1, "guidance_scale": 1.0}, "eval": {"images": 1}}
FAST = (
    "--preset=tiny",
    "--steps=1",
    "--set=sample.num_inference_steps=1",
    "--set=gradient.k_max=1",
    "--set=train.batch_size=2",
    "--set=train.micro_batch=2",
    "--set=eval.images=1",
    "--set=eval.every=0",
    "--quiet",
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return a LoRA of the embedded model, without a header of ours."""
    folder = tmp_path_factory.mktemp("trust")
    model = open_model(ModelConfig(id="tiny"), [""], torch.device("cpu"))
    module = model.network.module
    lora.inject(module, rank=2, alpha=2, target_modules=("to_q",), seed=0)
    metadata = lora.adapter_metadata(module)
    prefix = model.family.lora_prefix
    files.save(folder, lora.weights(module), {}, prefix=prefix, adapter_metadata=metadata)
    return load_file(folder / LORA_FILE)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return an empty folder to work in, with code of somebody's above it."""
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "evil_module.py").write_text(EVIL)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    monkeypatch.syspath_prepend(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    forget()
    yield tmp_path
    sys.modules.pop("evil_module", None)


@pytest.fixture
def run(capsys, place):
    """Return a function that runs a command, and gives its exit code, output and messages."""

    def call(*args):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, args)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return ended.value.code or 0, captured.out, captured.err

    return call


def lora_file(weights, config, name="evil.safetensors") -> Path:
    """Write a LoRA file here that says how to sample with it."""
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    header = {"alignprop.config": json.dumps(SHORT | config), "alignprop.base_model": "tiny"}
    save_file(weights, file, {"format": "pt", **header})
    return file


def run_folder(weights, config) -> Path:
    """Write a run folder here whose config.yaml and checkpoint agree."""
    config = {"gradient": {"window_group": 32}} | config  # what a run of 128 images a step keeps
    state = checkpoint.State(1, 128, {"p.step": torch.zeros(())})
    checkpoint.save(Path("r"), state, lambda made: lora_file(weights, config, made / LORA_FILE))
    Path("r/config.yaml").write_text(yaml.safe_dump(SHORT | config))
    return Path("r")


def typed(err) -> list[str]:
    """Return the words that the message says to type."""
    return shlex.split(err.partition(TYPE)[2].splitlines()[0])


def nothing_ran() -> bool:
    loaded = [name for name in sys.modules if name.startswith("alignprop_user_reward_")]
    return not Path("pwned").exists() and "evil_module" not in sys.modules and not loaded


def forget() -> None:
    """Forget what was imported from files."""
    for name in [n for n in sys.modules if n.startswith("alignprop_user_reward_")]:
        del sys.modules[name]


CODE = {
    "command": POPEN,
    "file": {"../evil.py:r": {}},
    "module": {"evil_module:r": {}},
    "beside": {"brightness": {}, "evil_module:r": {}},
}
COMMANDS = {
    "evaluate a file": lambda w, c: ["evaluate", lora_file(w, c)],
    "evaluate a run": lambda w, c: ["evaluate", run_folder(w, c)],
    "evaluate a checkpoint": lambda w, c: [
        "evaluate",
        run_folder(w, c) / "checkpoints/step-000001",
    ],
    "soup": lambda w, c: ["soup", lora_file(w, c), "base", "--evaluate", "-o", "mix"],
    "sweep": lambda w, c: ["soup", lora_file(w, c), "base", "--sweep", "0:1:1", "-o", "mix"],
    "resume": lambda w, c: ["train", "--resume", run_folder(w, c)],
    "dry run": lambda w, c: ["train", "--dry-run", "--resume", run_folder(w, c)],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("reward", CODE.values(), ids=CODE)
def test_code_that_a_file_names_is_refused_and_not_run(run, weights, command, reward) -> None:
    args = command(weights, {"reward": reward})
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert nothing_ran()
    name = list(reward)[-1]
    assert f"reward.{name}: this reward is code, which would be run" in err
    assert typed(err)[:2] == ["--reward", ",".join(reward)]
    assert not Path("mix").exists()


TO_GO_ON = [name for name in COMMANDS if name != "resume"]


@pytest.mark.parametrize("command", TO_GO_ON)
def test_with_the_words_of_the_message_the_code_runs(run, weights, command) -> None:
    args = COMMANDS[command](
        weights, {"reward": {"brightness": {}, "../evil.py:r": {"weight": 0.5}}}
    )
    words = typed(run(*args)[2])
    assert nothing_ran()
    code, out, err = run(*args, *words)
    assert code == 0, err
    assert "../evil.py:r" in out
    # A plan loads the reward too, to ask for its memory.
    assert Path("pwned").exists()


def test_a_command_in_the_options_has_to_be_typed_besides_the_name(run, weights) -> None:
    file = lora_file(weights, {"reward": POPEN})
    code, _, err = run("evaluate", file, "--reward", "subprocess:Popen")
    assert code == 2
    assert nothing_ran()
    assert "reward.subprocess:Popen.args: ['touch', 'pwned'] would be given to code" in err
    words = typed(err)
    assert words == ["--set", "reward.subprocess:Popen.args=[touch, pwned]"]
    # No reward, but it is what was asked for: the test would see it.
    assert run("evaluate", file, "--reward", "subprocess:Popen", *words)[0] == 4
    assert Path("pwned").exists()


def test_another_reward_by_flag_leaves_the_recorded_code_alone(run, weights) -> None:
    file = lora_file(weights, {"reward": POPEN})
    for way in (["--reward", "brightness"], ["--preset", "tiny", "--images", 1, "--overwrite"]):
        code, _, err = run("evaluate", file, *way)
        assert code == 0, err
        assert nothing_ran()


def test_only_the_first_target_says_how_to_sample(run, weights) -> None:
    good = lora_file(weights, {"reward": {"brightness": {}}}, "good.safetensors")
    code, _, err = run("evaluate", good, lora_file(weights, {"reward": POPEN}))
    assert code == 0, err
    assert nothing_ran()


def test_a_mix_says_what_to_type_and_the_member_whose_configuration_counts(run, weights) -> None:
    save_file(weights, "bare.safetensors", {"alignprop.base_model": "tiny"})
    mine = lora_file(weights, {"reward": {"../evil.py:r": {}}})
    members = ("soup", "bare.safetensors", mine, "-o", "mix")
    code, _, err = run(*members, "--evaluate")
    assert code == 2
    assert f"error: {mine}: this configuration came with the weights" in err
    code, out, err = run(*members)
    assert code == 0, err
    assert out.splitlines()[-1] == "next: alignprop evaluate mix --reward ../evil.py:r"
    assert nothing_ran()
    # Without a word of ours in its members a mix has none either.
    save_file(weights, "other.safetensors")
    assert run("soup", "other.safetensors", "base", "-o", "other")[1].endswith("evaluate other\n")


# --- A run of one's own ---


def test_a_run_with_code_is_resumed_and_evaluated_by_naming_it(run) -> None:
    mine = ("--reward", "brightness:0.5", "--reward", "../evil.py:R")
    more = ("--set", "reward.../evil.py:R.file=x", "--set", "reward.../evil.py:R.gain=2")
    code, out, err = run("train", *FAST, "--output", "r", *mine, *more, "--json")
    assert code == 0, err
    words = ["--reward", "brightness,../evil.py:R", "--set", "reward.../evil.py:R.file=x"]
    assert json.loads(out)["next"] == shlex.join(["alignprop", "evaluate", "r", *words])

    Path("pwned").unlink()
    forget()
    ask = ("train", "--resume", "r", "--steps", 2, "-q")
    code, _, err = run(*ask)
    assert code == 2
    assert typed(err) == words
    assert nothing_ran()
    # Naming the code alone drops no other reward.
    assert run(*ask, "--reward", "../evil.py:R", *words[2:])[0] == 0
    assert list(yaml.safe_load(Path("r/config.yaml").read_text())["reward"]) == [
        "brightness",
        "../evil.py:R",
    ]
    # A reward that the run does not have is still another run.
    code, _, err = run(*ask, "--reward", "contrast", "--steps", 3)
    assert code == 2
    assert "reward.contrast" in err
    assert run("evaluate", "r", *words, "--images", 1)[0] == 0


@pytest.mark.long
def test_resume_auto_takes_what_the_line_names_for_a_new_run_as_named(run) -> None:
    Path("mine.yaml").write_text("extends: tiny\nreward: {'../evil.py:R': {file: x}}\n")
    line = ("train", "--config", "mine.yaml", *FAST[1:], "--resume", "auto")
    assert run(*line)[0] == 0
    assert run(*line, "--steps", 2)[0] == 0
    assert len(Path("runs/mine/metrics.jsonl").read_text().splitlines()) == 2
    assert run("train", "--resume", "auto", "--steps", 3, "-q")[0] == 2


@pytest.mark.long
def test_a_prompt_file_of_a_run_has_to_be_named_to_go_on(run) -> None:
    prompts = ("--set", "train.prompts=../prompts.txt")
    assert run("train", *FAST, "--output", "r", *prompts)[0] == 0
    # What an interrupted run says is this, too.
    stopped = presets.resolve(config=Path("r/config.yaml"))
    words = shlex.join(prompts)
    assert next_command("alignprop", stopped, trust.TO_RESUME) == f"alignprop {words}"
    code, _, err = run("train", "--resume", "r", "--steps", 2, "-q")
    assert code == 2
    assert typed(err) == list(prompts)
    assert run("train", "--resume", "r", "--steps", 2, "-q", *prompts)[0] == 0
    # Evaluating it reads the other prompts only.
    assert run("evaluate", "r", "--images", 1)[0] == 0


def test_where_a_run_began_has_to_be_named_until_it_has_a_checkpoint(run, weights) -> None:
    config = {"reward": {"brightness": {}}, "lora": {"init": "../somewhere"}}
    folder = run_folder(weights, config)
    assert recorded.resume(folder).lora.init == "../somewhere"
    shutil.rmtree(folder / "checkpoints")
    code, _, err = run("train", "--resume", folder)
    assert code == 2
    assert typed(err) == ["--set", "lora.init=../somewhere"]
    assert run("train", "--resume", folder, *typed(err))[0] == 3


def test_a_runs_configuration_reads_no_other_file(run, weights) -> None:
    folder = run_folder(weights, {"reward": {"brightness": {}}})
    (folder / "more.yaml").write_text("sample: {eta: 1.0}\n")
    with (folder / "config.yaml").open("a") as file:
        file.write("extends: more.yaml\n")
    for command in (["evaluate", folder], ["train", "--resume", folder]):
        code, _, err = run(*command)
        assert code == 2
        assert "is complete and extends nothing" in err
    assert run("evaluate", folder, "--config", folder / "config.yaml")[0] == 0


# --- Files and hub ids ---

PLACES = [
    ({"model": {"id": "../model"}}, ["--model", "../model"]),
    ({"model": {"id": "somebody/model"}}, ["--model", "somebody/model"]),
    ({"model": {"revision": "refs/pr/5"}}, ["--set", "model.revision=refs/pr/5"]),
    ({"model": {"variant": "ema"}}, ["--set", "model.variant=ema"]),
    ({"model": {"config": "/etc"}}, ["--set", "model.config=/etc"]),
    ({"eval": {"prompts": "../prompts.txt"}}, ["--set", "eval.prompts=../prompts.txt"]),
    ({"eval": {"prompts": "null"}}, ["--set", "eval.prompts='null'"]),
    ({"reward": {"clip": {"model": "local-dir:x"}}}, ["--set", "reward.clip.model=local-dir:x"]),
    ({"reward": {"clip": {"pretrained": "x.pt"}}}, ["--set", "reward.clip.pretrained=x.pt"]),
    ({"reward": {"clip_choice": {"prompts": "a b"}}}, ["--set", "reward.clip_choice.prompts=a b"]),
    ({"reward": {"aesthetic": {"head": "~/x"}}}, ["--set", "reward.aesthetic.head=~/x"]),
    ({"reward": {"hps": {"weights": "x/y"}}}, ["--set", "reward.hps.weights=x/y"]),
    ({"reward": {"remove": {"model": "x/y"}}}, ["--set", "reward.remove.model=x/y"]),
    ({"reward": {"installed": {"key": "x"}}}, ["--set", "reward.installed.key=x"]),
    ({"reward": {"installed": {"key": {"a": 1}}}}, ["--set", "reward.installed.key={a: 1}"]),
]


@pytest.mark.parametrize(("config", "words"), PLACES, ids=[words[1] for _, words in PLACES])
def test_a_file_or_hub_id_is_refused_until_it_is_typed(run, weights, config, words) -> None:
    code, out, err = run("evaluate", lora_file(weights, config))
    assert (code, out) == (2, "")
    assert typed(err) == words
    key = "model.id" if words[0] == "--model" else words[1].partition("=")[0]
    assert f"  {key}: " in err
    # With these words it is as if the user had written it.
    given = {"flags": {"model.id": words[1]}} if words[0] == "--model" else {}
    given = given or {"assignments": [words[1]]}
    assert recorded.build(header=config, **given) == parse({"reward": {"clip": None}} | config)


def test_the_base_model_of_a_header_without_a_configuration_is_held_to_it_too(run, weights) -> None:
    save_file(weights, "bare.safetensors", {"alignprop.base_model": "somebody/model"})
    code, _, err = run("evaluate", "bare.safetensors")
    assert code == 2
    assert typed(err) == ["--model", "somebody/model"]


def test_the_prompts_of_a_header_are_read_once_they_are_typed(run, weights) -> None:
    file = lora_file(weights, {"reward": {"brightness": {}}, "eval": {"prompts": "../prompts.txt"}})
    assert run("evaluate", file, "--images", 1)[0] == 2
    assert run("evaluate", file, "--images", 1, "--prompts", "../prompts.txt")[0] == 0


@pytest.mark.parametrize("name", presets.names())
def test_what_a_shipped_preset_names_needs_no_typing(name) -> None:
    config = presets.resolve(preset=name)
    values = config.model_dump(mode="json")
    assert recorded.build(header=values) == config
    assert next_command("alignprop", config, trust.TO_RESUME) == "alignprop"


def test_what_is_shipped_and_numbers_need_no_typing() -> None:
    names = {name: dict(spec.places) for name, spec in registry.SHIPPED.items()}
    names |= {"installed": {"gain": 2.0, "most": 3, "on": True, "key": None}}
    for model in ("tiny", *PUBLISHED):
        for prompts in ("animals", "shapes-heldout", "hpd", "hpd:photo"):
            header = {"model": {"id": model}, "eval": {"prompts": prompts}, "reward": names}
            assert recorded.build(header=header).reward.keys() == names.keys()
    free = {"remove": {"object": "a dog"}, "clip_choice": {"prompts": "dogs", "alike": ["a"]}}
    free |= {name: {"model": "tiny-resnet"} for name in ("clip", "clip_count")}
    assert recorded.build(header={"reward": free}).reward.keys() == free.keys()


LARGE = [
    ("sample.num_inference_steps", 1000),
    ("sample.height", 2048),
    ("sample.width", 2048),
    ("eval.images", 10_000),
    ("eval.images_per_prompt", 1000),
    ("eval.batch_size", 256),
]


@pytest.mark.parametrize(("key", "largest"), LARGE)
def test_a_number_that_would_take_days_is_refused_until_it_is_typed(key, largest) -> None:
    section, _, name = key.partition(".")

    def header(value: int) -> dict:
        return {"reward": {"brightness": {}}, section: {name: value}}

    assert recorded.build(header=header(largest)).model_dump()[section][name] == largest
    with pytest.raises(ConfigError) as caught:
        recorded.build(header=header(largest + 1))
    (problem,) = caught.value.problems
    assert problem.key == key
    assert problem.message == f"{largest + 1} is more than {largest}, the most that goes untyped"
    word = f"{key}={largest + 1}"
    assert caught.value.hint.endswith(f"{TYPE}--set {word}")
    assert recorded.build(header=header(largest + 1), assignments=[word]) is not None
    # A user's own numbers have the bounds of the schema alone.
    assert presets.resolve(rewards={"brightness": None}, assignments=[word]) is not None


def test_a_large_number_in_a_header_ends_at_once(run, weights) -> None:
    file = lora_file(weights, {"reward": {"brightness": {}}, "eval": {"images": 10**9}})
    code, out, err = run("evaluate", file)
    assert (code, out) == (2, "")
    assert typed(err) == ["--set", "eval.images=1000000000"]
    # Typed it is still more than fits.
    code, _, err = run("evaluate", file, *typed(err))
    assert code == 4
    assert "an evaluation of 2000000000 images of 48 x 48 pixels needs " in err
    assert "GiB, and the disk has " in err


def test_everything_refused_is_said_at_once() -> None:
    header = {"model": {"id": "a/b"}, "reward": {"x.py:y": {"key": "k"}}}
    with pytest.raises(ConfigError) as caught:
        recorded.build(header=header)
    assert [problem.key for problem in caught.value.problems] == [
        "model.id",
        "reward.x.py:y",
        "reward.x.py:y.key",
    ]
    line = "--reward x.py:y --model a/b --set reward.x.py:y.key=k"
    assert caught.value.hint.endswith(TYPE + line)


def test_held_out_code_of_a_run_is_refused_until_it_is_typed_with_its_options() -> None:
    header = {"reward": {"clip": {}}, "eval": {"rewards": {"x.py:y": {"key": "k", "n": 2}}}}
    config = parse(header)
    words = trust.words_to_type(config, shipped_names(), keys=trust.TO_RESUME)
    assert words == (
        "--set eval.rewards.x.py:y=null --set eval.rewards.x.py:y.n=2 "
        "--set eval.rewards.x.py:y.key=k"
    )
    # Typed, they are what the run had, and need no more words.
    layers = presets.Layers()
    presets.override(layers, [word for word in words.split() if word != "--set"])
    assert layers.values["eval"] == header["eval"]
    given = {"assignments": [word for word in words.split() if word != "--set"]}
    refuse_untyped(config, given, "here", trust.TO_RESUME)
    with pytest.raises(ConfigError, match="asks for what you did not name"):
        refuse_untyped(config, {}, "here", trust.TO_RESUME)
    # An evaluation does not measure with them.
    assert trust.words_to_type(config, shipped_names()) is None


@pytest.mark.parametrize(
    "header",
    [
        {"reward": {"x.py:y\x1b[2J": {}}},
        {"reward": {"\x1b[2J": {}, "x.py:y": {}}},
        {"reward": {"clip,x.py:y": {}}},
        {"reward": {"x.py:y": {"a.b": "k"}}},
        {"model": {"id": "x\u202ey"}},
    ],
    ids=["escape", "beside", "comma", "dot", "direction"],
)
def test_what_cannot_be_read_or_typed_gets_no_line_to_copy(header) -> None:
    with pytest.raises(ConfigError) as caught:
        recorded.build(header=header)
    assert "a file of your own for --config" in caught.value.hint
    assert all(c.isprintable() or c == "\n" for c in caught.value.message)


def test_a_long_text_does_not_flood_the_message() -> None:
    with pytest.raises(ConfigError) as caught:
        recorded.build(header={"eval": {"prompts": "x" * 100_000}})
    assert len(caught.value.message) < 1000


def test_sizes_without_reason_are_refused(run, weights) -> None:
    config = {"sample": {"height": 1_000_000, "width": 1_000_000}, "eval": {"batch_size": 10**9}}
    code, _, err = run("evaluate", lora_file(weights, config))
    assert code == 2
    for key in ("sample.height", "sample.width", "eval.batch_size"):
        assert f"{key}: input should be less than or equal to" in err
    assert Config.model_validate({"sample": {"height": 8192}, "eval": {"batch_size": 4096}})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("ab"), inner),
    max_leaves=4,
)


@given(VALUES)
def test_a_value_written_for_set_is_read_back(value) -> None:
    layers = presets.Layers()
    presets.override(layers, [presets.assignment("reward.a.b", value)])
    assert layers.values == {"reward": {"a": {"b": value}}}
    assert presets.assignment("reward.a.b", value).isprintable()
