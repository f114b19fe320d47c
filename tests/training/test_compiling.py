"""Compiling the blocks of the network: the same gradient, and nothing is left where it fails."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignprop_cli import models
from alignprop_cli.errors import NonFinite
from alignprop_cli.models.compiled import uncompiled
from alignprop_cli.rewards.mixture import Member, Mixture
from alignprop_cli.training import compiling
from alignprop_cli.training.compiling import compile_network
from alignprop_cli.training.trainer import Trainer
from alignprop_cli.training.trial import Trial
from tests.factories import TEXT_WIDTH, small_pipeline
from tests.training.test_trainer import (
    hold_still,
    make_trainer,
    parameters,
    relative_difference,
    small_config,
)

SECTIONS: dict[str, dict[str, object]] = {
    "sample": {"num_inference_steps": 2, "eta": 0.0},
    "gradient": {"window_group": 2, "k_max": 2},
    "train": {"batch_size": 2, "micro_batch": 2, "max_grad_norm": None},
}
STEPS = 3
CONFIG = small_config(**SECTIONS)


def compiled_blocks(trainer: Trainer) -> int:
    return sum(m._compiled_call_impl is not None for m in trainer.model.network.module.modules())


def gradient(trainer: Trainer) -> torch.Tensor:
    hold_still(trainer)
    trainer.step()
    return torch.cat([p.grad.flatten() for p in parameters(trainer) if p.grad is not None])


def gradients(backend: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Return the gradient of a step without and with compiled blocks, and what was said."""
    plain, compiled = make_trainer(CONFIG), make_trainer(CONFIG)
    said: list[str] = []
    compile_network(Trial(compiled), STEPS, True, said.append, backend=backend)
    network = compiled.model.network.module
    kinds = {type(m).__name__ for m in network.modules() if m._compiled_call_impl is not None}
    assert kinds == {"BasicTransformerBlock", "ResnetBlock2D"}
    return gradient(plain), gradient(compiled), said


@pytest.mark.long
def test_compiled_blocks_give_the_same_gradient() -> None:
    """Traced and differentiated by the compiler, with the operators as they are."""
    plain, compiled, said = gradients("aot_eager")
    assert float(plain.norm()) > 1e-4
    assert relative_difference(compiled, plain) < 1e-4
    assert len(said) == 1
    assert "compiled the network's blocks" in said[0]


@pytest.mark.long
@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_trial_whose_rewards_are_nan_is_no_end_where_steps_are_skipped(policy: str) -> None:
    def broken(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3)) * math.nan

    config = small_config(**{**SECTIONS, "train": {**SECTIONS["train"], "on_nonfinite": policy}})
    made = make_trainer(config, Mixture([Member("broken", broken, 1.0, config.loss)]))
    said: list[str] = []
    made.note = said.append
    if policy == "stop":
        with pytest.raises(NonFinite, match="'broken' returned nan"):
            compile_network(Trial(made), STEPS, True, said.append, backend="aot_eager")
        return
    trial = Trial(made)
    compile_network(trial, STEPS, True, said.append, backend="aot_eager")
    trial.part_seconds(2, ("reward",))
    assert len(said) == 2
    assert "before the first step: reward 'broken' returned nan for image 0" in said[0]
    assert "compiled the network's blocks" in said[1]
    assert compiled_blocks(made)
    # Nothing is left of it, and the steps themselves are skipped.
    assert all(p.grad is None for p in parameters(made))
    assert "'broken' returned nan" in str(made.step().skipped)
    assert made.finite.skipped_in_row == 1


@pytest.mark.slow
def test_blocks_compiled_to_machine_code_give_the_same_gradient() -> None:
    plain, compiled, _ = gradients("inductor")
    assert relative_difference(compiled, plain) < 1e-4


@pytest.mark.long
def test_all_sizes_of_blocks_are_compiled_and_evaluation_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four sizes of blocks, with and without gradient, share the compiler's limit."""
    monkeypatch.setattr(models.compiled, "_ALSO", ())  # one kind of block is enough here
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    cross = "CrossAttnDownBlock2D"
    path = small_pipeline(
        tmp_path / "model",
        block_out_channels=(16, 24, 32, 40),
        down_block_types=(cross, cross, cross, cross),
        up_block_types=("CrossAttnUpBlock2D",) * 4,
        norm_num_groups=8,
    )
    trainer = make_trainer(small_config(**SECTIONS, model={"id": str(path)}))
    compile_network(Trial(trainer), STEPS, True, lambda text: None, backend=counting)  # type: ignore[arg-type]
    first = len(graphs)
    assert first >= 8
    trainer.apply_plan(replace(trainer.plan, rollout_batch=1, micro_batch=1, decode_batch=1))
    Trial(trainer).run_micro_batch(calls=1)
    assert len(graphs) == 2 * first  # another batch size
    done = len(graphs)
    with uncompiled(trainer.model.network.module):
        assert compiled_blocks(trainer) == 0
        trainer.model.network.module(torch.zeros(3, 4, 8, 8), 1, torch.zeros(3, 16, TEXT_WIDTH))
    assert len(graphs) == done
    assert compiled_blocks(trainer) > 0


@pytest.mark.long
def test_what_cannot_be_compiled_runs_as_it_is_and_says_so() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here\nand more of it")

    trainer, said = make_trainer(CONFIG), list[str]()
    compile_network(Trial(trainer), STEPS, True, said.append, backend=broken)  # type: ignore[arg-type]
    assert compiled_blocks(trainer) == 0
    assert "cannot be compiled here and run as they are" in said[0]
    assert torch.equal(gradient(trainer), gradient(make_trainer(CONFIG)))


@pytest.mark.parametrize("wanted", [False, "auto"])
def test_on_the_cpu_nothing_is_compiled_unless_it_is_asked_for(wanted: Any) -> None:
    trainer = make_trainer(CONFIG)
    compile_network(Trial(trainer), STEPS, wanted, pytest.fail)
    assert compiled_blocks(trainer) == 0


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, seconds: list[float | Exception]) -> Trainer:
    """Return a trainer of a run on a GPU, whose micro-batches take so many seconds."""
    trainer, times = make_trainer(small_config()), iter(seconds)

    def timed(trial: Trial) -> float:
        taken = next(times)
        if isinstance(taken, Exception):
            raise taken
        return taken

    monkeypatch.setattr(compiling, "_timed", timed)
    monkeypatch.setattr(Trial, "run_micro_batch", lambda *arguments: None)
    monkeypatch.setattr(
        type(trainer.model), "device", property(lambda model: torch.device("cuda", 0))
    )
    return trainer


@pytest.mark.parametrize(("steps", "tried"), [(133, False), (134, True)])
def test_a_run_of_twenty_minutes_and_more_is_worth_trying(
    monkeypatch: pytest.MonkeyPatch, steps: int, tried: bool
) -> None:
    said: list[str] = []
    trainer = on_a_gpu(monkeypatch, [9.0, 9.0, 50.0, 6.0])
    assert trainer.plan.accumulation == 1
    compile_network(Trial(trainer), steps, "auto", said.append, backend="aot_eager")
    assert (compiled_blocks(trainer) > 0) is tried
    assert len(said) == tried


def test_where_memory_runs_out_before_compiling_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    trainer = on_a_gpu(monkeypatch, [torch.OutOfMemoryError("CUDA out of memory")])
    compile_network(Trial(trainer), STEPS, True, said.append)
    assert compiled_blocks(trainer) == 0
    assert said == ["the network's blocks are not compiled: memory ran out before that"]


@pytest.mark.parametrize(("seconds", "kept"), [([9.0, 9.0, 50.0, 6.0], True), ([9.0] * 4, False)])
def test_what_is_not_faster_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, seconds: list[float | Exception], kept: bool
) -> None:
    trainer, said = on_a_gpu(monkeypatch, seconds), list[str]()
    compile_network(Trial(trainer), 1000, "auto", said.append, backend="aot_eager")
    assert (compiled_blocks(trainer) > 0) is kept
    assert ("not worth keeping" in said[0]) is not kept
