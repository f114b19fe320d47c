"""A reward of the user's own from the command line: it works, and what is wrong with it is told."""

from __future__ import annotations

import json
import os
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from alignprop_cli import images
from alignprop_cli.cli import main
from alignprop_cli.rewards import registry
from tests.factories import picture

OWN = """
import torch

class Blueness:
    def __init__(self, gain=1.0):
        self.gain = gain
        self.extra_metrics = {"luma": lambda images: images.mean(dim=(1, 2, 3))}

    def __call__(self, images, prompts):
        return self.gain * images[:, 2].mean(dim=(1, 2))
"""

WRONG = """
import torch

def broken(images, prompts):
    return images.mean(dim=(1, 2, 3)) * float("nan")

def single(images, prompts):
    return images.mean()

def column(images, prompts):
    return images.mean(dim=(2, 3)).mean(dim=1, keepdim=True)

def listed(images, prompts):
    return [0.0] * len(prompts)

def falls(images, prompts):
    return 1 / 0

def ends(images, prompts):
    raise SystemExit

def alone(images):
    return images.mean(dim=(1, 2, 3))

def changes(images, prompts):
    images -= 0.5
    return images.mean(dim=(1, 2, 3))

class Unbuilt:
    def __init__(self):
        raise ValueError("no key")

class Unmoved:
    def to(self, device):
        raise ValueError("too heavy")

class Extra:
    extra_metrics = {"area": lambda images: 1 / 0}

    def __call__(self, images, prompts):
        return images.mean(dim=(1, 2, 3))

def complicated(images, prompts):
    return images.mean(dim=(1, 2, 3)) * 1j

def through_data(images, prompts):
    images.data.mul_(0.5)
    return images.mean(dim=(1, 2, 3))

def clears(images, prompts):
    count = len(prompts)
    prompts.clear()
    return images.mean(dim=(1, 2, 3))[:count]

def prints(images, prompts):
    print("hello")
    return images.mean(dim=(1, 2, 3))

class Odd(BaseException):
    pass

def odd(images, prompts):
    raise Odd("as it likes")

def closes(images, prompts):
    raise GeneratorExit

class Property:
    @property
    def extra_metrics(self):
        return {}["key"]

class Missing:
    @property
    def extra_metrics(self):
        return self.nothing

class ExtraNan(Property):
    extra_metrics = {"area": lambda images: images.mean(dim=(1, 2, 3)) * float("nan")}

    def __call__(self, images, prompts):
        return images.mean(dim=(1, 2, 3))

class ExtraShape(ExtraNan):
    extra_metrics = {"area": lambda images: images.mean()}

class ExtraChanges(ExtraNan):
    extra_metrics = {"area": lambda images: images.mul_(0.0).mean(dim=(1, 2, 3))}

NUMBER = 3

def infinite(images, prompts):
    return (0.0 * images).sqrt().mean(dim=(1, 2, 3))

class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images):
        return images.mean(dim=(1, 2, 3))

    @staticmethod
    def backward(ctx, gradient):
        raise KeyError("mine")

def backward(images, prompts):
    return Backward.apply(images)

def blind(images, prompts):
    return images.detach().mean(dim=(1, 2, 3))

head = torch.nn.Linear(3, 1)

def unfrozen(images, prompts):
    return head(images.detach().mean(dim=(2, 3)))[:, 0]

def stale(images, prompts):
    roots = images.exp()
    return roots.mul_(2.0).mean(dim=(1, 2, 3))
"""

SHORT = (
    "--preset=tiny",
    "--set=sample.num_inference_steps=1",
    "--set=gradient.k_max=1",
    "--set=eval.images=1",
    "--output=out",
)
COMMANDS = {
    "train": (
        *SHORT,
        "--steps=1",
        "--set=train.batch_size=2",
        "--set=train.micro_batch=2",
        "--set=eval.sample_images=1",
    ),
    "evaluate": ("base", *SHORT),
    "score": ("images", "--prompt=a cat"),
}


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Return a function that runs a command in a folder with rewards and an image."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    Path("wrong.py").write_text(WRONG)
    Path("breaks.py").write_text("KEY = {}['key']\n")
    Path("garbled.py").write_text("def x(:\n")
    Path("folder.py").mkdir()
    os.mkfifo("pipe.py")
    Path("latin.py").write_bytes(b"# caf\xe9\ndef x(images, prompts): ...\n")
    Path("getattr.py").write_text("def __getattr__(name):\n    return 1 / 0\n")
    Path("ends.py").write_text("import sys\nsys.exit(0)\n")
    picture(Path("images/a.png"))

    def call(command, *args):
        with pytest.raises(SystemExit) as ended:
            main([command, *COMMANDS[command], *args])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return ended.value.code or 0, captured.out, captured.err

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_ten_lines_are_a_reward(run, command) -> None:
    assert len(OWN.split("\n")) <= 12
    name = "own.py:Blueness"
    code, out, err = run(command, "--reward", name, "--set", f"reward.{name}.gain=2.0", "--json")
    assert code == 0, err
    result = json.loads(out)
    rewards = (result["held_out"] if command == "train" else result)["rewards"]
    assert set(rewards) >= {name, "luma"}
    if command == "score":
        assert rewards[name]["mean"] == pytest.approx(2.0 * rewards["luma"]["mean"])


MISTAKES = [
    ("wrong.py:broken", 4, "'wrong.py:broken' returned nan for image 0 of the batch, prompt"),
    ("wrong.py:single", 2, "'wrong.py:single': expected a tensor of shape"),
    ("wrong.py:column", 2, "'wrong.py:column': expected a tensor of shape"),
    ("wrong.py:listed", 2, "'wrong.py:listed': expected a tensor of shape (1,), got list"),
    ("wrong.py:falls", 4, "'wrong.py:falls' failed: ZeroDivisionError: division by zero"),
    ("wrong.py:ends", 4, "'wrong.py:ends' failed: SystemExit"),
    ("wrong.py:alone", 4, "'wrong.py:alone' failed: TypeError"),
    ("wrong.py:changes", 2, "'wrong.py:changes' changes the images it is given"),
    ("wrong.py:Unbuilt", 3, "'wrong.py:Unbuilt': cannot be built: ValueError: no key"),
    ("wrong.py:Unmoved", 3, "'wrong.py:Unmoved': cannot be moved to cpu: ValueError: too heavy"),
    ("wrong.py:Extra", 4, "extra metric 'area' failed: ZeroDivisionError"),
    ("wrong.py:none", 2, "wrong.py has no 'none'"),
    ("breaks.py:x", 3, "'breaks.py:x': cannot import breaks.py: KeyError: 'key'"),
    ("garbled.py:x", 2, "garbled.py:1: invalid syntax"),
    ("absent.py:x", 3, "no such file: absent.py"),
]

# Told by the same code in every command, so that one of them, the quickest, is asked.
MORE = [
    ("wrong.py:complicated", 2, "'wrong.py:complicated': expected real numbers, got torch.complex"),
    ("wrong.py:through_data", 2, "'wrong.py:through_data' changes the images it is given"),
    ("wrong.py:odd", 4, "'wrong.py:odd' failed: Odd: as it likes"),
    ("wrong.py:closes", 4, "'wrong.py:closes' failed: GeneratorExit"),
    ("wrong.py:Property", 2, "'wrong.py:Property': extra_metrics cannot be read: KeyError"),
    ("wrong.py:Missing", 2, "'wrong.py:Missing': extra_metrics cannot be read: AttributeError"),
    ("wrong.py:ExtraNan", 4, "'wrong.py:ExtraNan': extra metric 'area' returned nan for image 0"),
    ("wrong.py:ExtraShape", 2, "'wrong.py:ExtraShape': extra metric 'area': expected a tensor"),
]

# What no name may lead to but one message.
NAMES = [
    ("wrong.py:NUMBER", 2, "its int is not a function or a class"),
    ("wrong.py:", 2, "wrong.py has no ''"),
    ("folder.py:x", 3, "a folder, a pipe or a device: folder.py"),
    ("pipe.py:x", 3, "a folder, a pipe or a device: pipe.py"),
    ("~nosuchuser/x.py:y", 2, "is no path"),
    ("x" * 300 + ".py:y", 2, "File name too long"),
    ("latin.py:x", 2, "latin.py"),
    ("nobody.nothing:x", 3, "cannot import nobody.nothing: ModuleNotFoundError"),
    ("..:x", 3, "cannot import .."),
    ("getattr.py:x", 3, "cannot import getattr.py: ZeroDivisionError"),
    ("ends.py:x", 3, "cannot import ends.py: SystemExit"),
    ("torch:Tensor", 2, "'torch:Tensor'"),
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("name", "code", "words"), MISTAKES, ids=[name for name, *_ in MISTAKES])
def test_a_mistake_is_told_with_its_exit_code(run, command, name, code, words) -> None:
    found, out, err = run(command, "--reward", name)
    assert (found, out) == (code, "")
    assert words in " ".join(err.split())


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("wrong.py:blind", 2, "'wrong.py:blind' has no gradient"),
        ("wrong.py:unfrozen", 2, "'wrong.py:unfrozen' has no gradient"),
        ("wrong.py:stale", 4, "the gradient of 'wrong.py:stale' failed: RuntimeError"),
        ("wrong.py:backward", 4, "the gradient of 'wrong.py:backward' failed: KeyError: 'mine'"),
        (
            "wrong.py:infinite",
            4,
            "the gradient of reward 'wrong.py:infinite' holds NaN or infinity",
        ),
    ],
)
@pytest.mark.long
def test_without_a_gradient_it_measures_and_does_not_train(run, name, code, words) -> None:
    assert run("score", "--reward", name)[0] == 0
    found, out, err = run("train", "--reward", name)
    assert (found, out) == (code, "")
    assert words in " ".join(err.split())


def test_a_gradient_of_exactly_nothing_is_told(run) -> None:
    Path("mine.py").write_text(
        "def steps(images, prompts):\n    return images.round().mean(dim=(1, 2, 3))\n"
    )
    code, _, err = run("train", "--reward", "mine.py:steps")
    assert code == 0
    assert "the gradient of the first step is exactly 0" in " ".join(err.split())


def test_an_option_that_it_does_not_take_is_refused(run) -> None:
    code, _, err = run("score", "--set", "reward.own.py:Blueness.gian=2")
    assert code == 2
    assert "gian" in err
    code, _, err = run("score", "--set", "reward.wrong.py:broken.weigth=2")
    assert code == 2
    assert "'wrong.py:broken' is a function and takes no options" in " ".join(err.split())


@pytest.mark.parametrize(
    ("name", "code", "words"), MORE + NAMES, ids=[name[:20] for name, *_ in MORE + NAMES]
)
def test_a_mistake_is_told_before_anything_else_happens(run, name, code, words) -> None:
    found, out, err = run("score", "--reward", name)
    assert (found, out) == (code, "")
    assert words in " ".join(err.split())


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        ("nobody.nothing:x", 3, "cannot import nobody.nothing"),
        ("json:nothing", 2, "json has no 'nothing'"),
        ("json:__name__", 2, "its str is not a function or a class"),
        ("json", 3, "cannot import"),
    ],
)
def test_a_broken_package_that_offers_a_reward_is_told(
    run, monkeypatch, value, code, words
) -> None:
    points = [EntryPoint("theirs", value, registry.GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    found, out, err = run("score", "--reward", "theirs")
    assert (found, out) == (code, "")
    assert words in " ".join(err.split())


def test_what_a_reward_does_to_its_inputs_reaches_nobody_else(run) -> None:
    Path("mine.py").write_text(
        "def after(images, prompts):\n"
        "    assert prompts == ['a cat']\n"
        "    return images.mean(dim=(1, 2, 3))\n"
    )
    names = "wrong.py:clears,wrong.py:ExtraChanges,mine.py:after"
    code, out, err = run("score", "--reward", names, "--json")
    assert code == 0, err
    found = json.loads(out)["rewards"]
    assert found["area"]["mean"] == 0.0
    # picture() is of the grey value 100.
    assert found["mine.py:after"]["mean"] == pytest.approx(100 / 255)


@pytest.mark.parametrize("command", ["evaluate", "score"])
def test_what_a_reward_prints_is_no_part_of_the_result(run, command) -> None:
    code, out, err = run(command, "--reward", "wrong.py:prints", "--json")
    assert code == 0, err
    assert json.loads(out)["schema"].startswith(f"alignprop.{command}/")
    assert "hello" in err


def test_of_several_rewards_the_one_with_the_infinite_gradient_is_named(run) -> None:
    code, _, err = run("train", "--reward", "brightness,wrong.py:infinite,own.py:Blueness")
    assert code == 4
    assert "the gradient of reward 'wrong.py:infinite' holds" in " ".join(err.split())


def test_an_error_of_the_network_is_not_blamed_on_the_reward(run, monkeypatch) -> None:
    def backward(ctx, gradient):
        raise KeyError("network")

    # The backward pass of the chain is broken, that of the reward is whole.
    monkeypatch.setattr(images._Saturate, "backward", staticmethod(backward))
    code, _, err = run("train", "--reward", "own.py:Blueness")
    assert code == 1
    assert "unexpected KeyError: 'network'" in err
    assert "Blueness' failed" not in err
