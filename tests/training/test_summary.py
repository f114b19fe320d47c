"""The end of a run: what its sheet shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alignprop_cli.evaluation import sheet
from alignprop_cli.training import summary
from tests.training.reported import images


@pytest.mark.parametrize(("count", "shown"), [(3, 3), (32, 32), (160, 32)])
def test_a_sheet_shows_some_pairs_of_many_each_with_its_own_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, shown: int
) -> None:
    prompts = [f"prompt {i}" for i in range(count)]
    base, tuned = images(0, prompts), images(1, prompts, shift=1.0)
    cells: list[sheet.Cell] = []
    monkeypatch.setattr(
        summary,
        "contact_sheet",
        lambda given, path, titles: (
            cells.extend(given),
            sheet.contact_sheet(given, path, titles=titles),
        ),
    )
    summary.write_sheet(tmp_path / "sheet.png", base, tuned, ("base", "tuned"))
    assert Image.open(tmp_path / "sheet.png").height > 0
    # In the order of the samples, none twice, and image and caption of the same one.
    numbers = [int(cell.prompt.split()[1]) for cell in cells]
    assert len(numbers) == shown
    assert numbers == sorted(set(numbers))
    for number, cell in zip(numbers, cells, strict=True):
        assert np.array_equal(cell.images[0], base.images[number])
        assert np.array_equal(cell.images[1], tuned.images[number])
        assert cell.captions == (base.caption(number), tuned.caption(number))
    # Of a sorted set not the beginning.
    assert count == shown or max(numbers) > shown
