"""Every example of docs/python.md runs, in its order, and so does every cell of the notebook."""

from __future__ import annotations

import json
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import alignprop_cli

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "python.md"
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
# What makes a run short; none changes what is exercised.
SHORT = {
    "sample.num_inference_steps": 1,
    "gradient.k_max": 1,
    "train.batch_size": 1,
    "train.micro_batch": 1,
    "eval.images": 1,
    "eval.sample_images": 1,
    "eval.sample_images_per_prompt": 1,
}
pytestmark = pytest.mark.long


def shortened(train: Any, *args: Any, steps: int, **options: Any) -> Any:
    if "resume" in options:  # its settings are those of the run
        return train(*args, steps=2, **options)
    overrides = {**SHORT, **options.pop("overrides", {})}
    return train(*args, steps=1, overrides=overrides, **options)


def test_the_examples_of_the_page_run_in_their_order_in_an_empty_folder(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) >= 7
    real = {name: getattr(alignprop_cli, name) for name in ("train", "evaluate")}
    monkeypatch.setattr(alignprop_cli, "train", partial(shortened, real["train"]), raising=False)
    seen: dict[str, Any] = {"__name__": "page"}
    for number, example in enumerate(examples, start=1):
        # The one that is wrong on purpose names no steps.
        if "stepz" in example:
            monkeypatch.setattr(alignprop_cli, "train", real["train"], raising=False)
        exec(compile(example, f"{PAGE.name}, example {number}", "exec"), seen)
    said = capsys.readouterr().out
    assert "train.stepz" in said
    assert "Did you mean" in said
    assert seen["rewards"].shape == (2,)
    assert seen["images"].grad.abs().max() > 0
    assert (tmp_path / "runs" / "blue" / "checkpoints" / "step-000002").is_dir()


def test_the_notebook_has_ten_cells_with_small_outputs_and_no_paths_of_its_author() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    cells = json.loads(text)["cells"]
    assert len(cells) == 10
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in code)
    assert len(text) < 200_000
    assert not re.search(r"/(root|home|work|tmp|Users)/", text)
    shown = {kind for cell in code for output in cell["outputs"] for kind in output.get("data", {})}
    assert "image/png" in shown
    for function in ("train", "evaluate", "soup", "score", "load_reward"):
        assert f"alignprop.{function}(" in text


@pytest.mark.skipif(
    not (find_spec("nbclient") and find_spec("ipykernel")),
    reason="nbclient and ipykernel are not installed",
)
def test_the_notebook_runs(tmp_path) -> None:
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = [[output.output_type for output in cell.get("outputs", [])] for cell in notebook.cells]
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    found = [[output.output_type for output in cell.get("outputs", [])] for cell in notebook.cells]
    assert found == stored
