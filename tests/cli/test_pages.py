"""The pages that the commands write work in a browser: headless Chromium, opened from the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pytest

from alignprop_cli.cli import main
from alignprop_cli.evaluation.sheet import save_image
from tests.factories import small_pipeline

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path")

SCRIPT = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def chromium():
    """Return a browser; as root it runs without its sandbox."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-background-networking", "--disable-component-update"],
        )
        yield browser
        browser.close()


@pytest.fixture
def show(chromium):
    """Return a function that opens a file and gives the page and what went wrong on it."""
    page = chromium.new_page()
    faults = []
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))

    def opened(path):
        page.goto(path.as_uri())
        # Pictures further down are loaded when they are seen.
        for picture in page.locator("img").all():
            picture.scroll_into_view_if_needed()
        page.wait_for_function("[...document.images].every((i) => i.complete && i.naturalWidth)")
        return page, faults

    yield opened
    page.close()


def run(*args):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, args)])
    assert not ended.value.code


def drawn(page):
    """Return the titles of the plots, once all of them are drawn."""
    page.wait_for_function(
        "[...document.querySelectorAll('.plot')].every((p) => p.querySelector('svg.main-svg path'))"
    )
    return page.locator(".plots figcaption").all_inner_texts()


def sorted_by(page, label):
    """Return the cards' captions in the order that a choice gives."""
    page.locator("#sort").select_option(label=label)
    return page.locator("article figcaption").all_inner_texts()


def test_a_gallery_sorts_shows_its_pictures_and_runs_no_prompt(tmp_path, show):
    for name, value in (("b", 200), ("a #1", 50), ("c", 100)):
        pixels = np.full((300, 300, 3), value, dtype=np.uint8)
        pixels[:value] //= 2
        save_image(pixels, tmp_path / f"{name}.png", {"prompt": SCRIPT if name == "b" else name})
    target = tmp_path / "pages" / "rows.csv"
    run("score", tmp_path, "--reward", "brightness,contrast", "-o", target, "--gallery", "-q")
    page, faults = show(target.with_suffix(".html"))
    assert page.title() == "3 of 3 images"
    assert drawn(page) == ["brightness", "contrast"]
    assert page.locator(".prompt").all_inner_texts() == [SCRIPT, "c", "a #1"]
    names = [
        caption.split("\n")[0] for caption in page.locator("article figcaption").all_inner_texts()
    ]
    assert names == ["b.png", "c.png", "a #1.png"]
    up = sorted_by(page, "brightness, smallest first")
    assert [caption.split("\n")[0] for caption in up] == names[::-1]
    by_contrast = sorted_by(page, "contrast, largest first")
    shown = [float(caption.rsplit(" ", 1)[1]) for caption in by_contrast]
    assert shown == sorted(shown, reverse=True)
    # The link leads to the file, whatever its name.
    hrefs = page.eval_on_selector_all("figure a", "links => links.map((a) => a.href)")
    assert {(tmp_path / f"{name}.png").as_uri() for name in ("b", "a #1", "c")} == set(hrefs)
    assert faults == []


@pytest.mark.long
def test_the_report_of_an_evaluation_sorts_and_shows_its_pictures(tmp_path, show):
    base = small_pipeline(tmp_path / "base")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a cat\n{SCRIPT}\na dog\n")
    config = {
        "model": {"id": str(base)},
        "sample": {"num_inference_steps": 2},
        "gradient": {"k_max": 2},
        "lora": {"rank": 2},
        "reward": {"brightness": {}},
        "train": {"prompts": str(prompts), "steps": 2, "batch_size": 2, "learning_rate": 0.1},
        "eval": {"prompts": str(prompts), "images": 3, "sample_images": 2, "every": 1},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    run("train", "--config", tmp_path / "config.yaml", "-o", tmp_path / "run", "-q")
    # What a run's configuration names from outside the package has to be typed again.
    typed = ("--model", base, "--prompts", prompts)
    run("evaluate", tmp_path / "run", *typed, "--scale", "0,1", "-o", tmp_path / "out", "-q")
    page, faults = show(tmp_path / "out" / "report.html")
    first = page.locator("article").evaluate_all("a => a.map((b) => b.dataset.number)")
    assert first == ["0", "1", "2"]
    assert SCRIPT in page.locator(".prompt").all_inner_texts()
    assert page.title() != "taken"
    page.locator("#sort").select_option(label="change of brightness, smallest first")
    key = page.locator("#sort").input_value()
    changes = page.locator("article").evaluate_all(f"a => a.map((b) => Number(b.dataset.{key}))")
    assert changes == sorted(changes)
    assert len(set(changes)) > 1
    links = page.eval_on_selector_all("figure a", "links => links.map((a) => a.href)")
    assert len(links) == 9
    assert all(Path(unquote(urlparse(link).path)).is_file() for link in links)
    # The curve over the two strengths, and the distributions.
    assert drawn(page) == ["brightness", "jpeg_kilobytes"] * 2
    assert page.locator("h2").all_inner_texts()[0] == "By strength of the LoRA"

    # What the run itself wrote: its three kinds of images, and the slider over two steps.
    page, faults = show(tmp_path / "run" / "report.html")
    assert "loss" in drawn(page)
    assert page.locator("#shown").inner_text().startswith("step 2 of 2")
    assert page.locator("#step").get_attribute("max") == "2"
    assert page.locator("#sorted article").count() == 3
    assert SCRIPT in page.locator("#sorted .prompt").all_inner_texts()
    assert page.title() == f"run: {base}"
    assert faults == []
