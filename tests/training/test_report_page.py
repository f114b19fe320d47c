"""A run's report in headless Chromium, opened from its file, with the network refused."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignprop_cli.training import frames
from tests.training.reported import Reported

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path")

ARGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"),
    *("--no-first-run", "--disable-component-update", "--disable-quic"),
]
EVIL = (
    "</script><script>document.title='taken'</script><!-- <img src=x "
    "onerror=\"document.title='taken'\"> {{ 7 * 7 }} &lt;b&gt; <b>bold</b>"
)
PROMPTS = ["a cat", "a dog", EVIL]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def show(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Return a function that opens a file; the test fails for whatever goes wrong on the page."""
    faults: list[str] = []
    contexts: list[Any] = []

    def opened(path: Path, *, width: int = 1280, scheme: str = "light", plots: bool = True) -> Any:
        size = {"width": width, "height": 900}
        contexts.append(chromium.new_context(viewport=size, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda said: faults.append(f"{said.type}: {said.text}"))
        page.on("pageerror", lambda error: faults.append(str(error)))
        # The file itself, and what is inside it.
        own = ("data:", "blob:", path.as_uri())
        page.on("request", lambda r: None if r.url.startswith(own) else faults.append(r.url))
        page.goto(path.as_uri())
        if plots:
            drawn(page)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def drawn(page: Any) -> None:
    """Wait until every plot of the page is there."""
    page.wait_for_function(
        "[...document.querySelectorAll('.plot')].every((p) => p.querySelector('svg.main-svg'))"
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """A run that has ended, with images of four evaluations."""
    run = Reported(tmp_path_factory.mktemp("reported") / "run", PROMPTS)
    run.begin()
    for step in range(1, 7):
        run.step(sampled=step % 2 == 0)
    run.run.console.warned.append(f"a warning about {EVIL}")
    run.finish()
    return run


def sources(page: Any) -> list[str]:
    """Return the images through training, the base model's beside each."""
    return page.eval_on_selector_all("#samples img", "all => all.map((i) => i.src)")


def test_the_slider_moves_the_images_by_mouse_and_by_keys(
    done: Reported, show: Callable[..., Any]
) -> None:
    page = show(done.file)
    slider, shown = page.locator("#step"), page.locator("#shown")
    assert shown.inner_text() == "step 6 of 6"
    last = sources(page)
    assert len(set(last)) == 6
    # 1. The mouse, to the left end: the base model, beside itself.
    box = slider.bounding_box()
    page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
    assert shown.inner_text() == "base model"
    first = sources(page)
    assert first[0::2] == first[1::2] == last[0::2]
    # 2. The slider's own arrow keys, and those of the page.
    slider.press("ArrowRight")
    assert shown.inner_text() == "step 2 of 6, the best"
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowRight")
    assert shown.inner_text() == "step 4 of 6"
    middle = sources(page)
    assert not set(middle[1::2]) & {*first, *last}
    page.wait_for_function(
        "[...document.querySelectorAll('#samples img')].every((i) => i.naturalWidth === 48)"
    )
    # 3. Scores are beside the base model's, and so is the change.
    data = page.evaluate("JSON.parse(document.querySelector('#data').textContent).images.steps")
    now, base = data[2]["rewards"]["clip"][0], data[0]["rewards"]["clip"][0]
    caption = page.locator("#samples figcaption").nth(1).inner_text()
    expected = f"clip {now:.3f} ({now - base:+.3f})".replace("-", "\u2212")
    assert expected in caption
    # 4. Without the base model beside.
    page.locator("#beside").uncheck()
    assert page.locator("#samples figure:visible").count() == 3
    # 5. All of it is still so when the page is loaded again.
    page.reload()
    assert shown.inner_text() == "step 4 of 6"
    assert not page.locator("#beside").is_checked()
    drawn(page)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_curves_are_drawn_and_nothing_is_wider_than_the_screen(
    done: Reported, show: Callable[..., Any], width: int, scheme: str
) -> None:
    page = show(done.file, width=width, scheme=scheme)
    titles = page.locator(".plots figcaption").all_inner_texts()
    assert {
        "clip, trained on",
        "brightness, held out",
        "loss",
        "gradient norm, before clipping",
        "learning rate",
        "share of the path with gradient",
        "seconds a step",
        "images an hour, without the evaluations",
        "peak memory so far, GiB",
        "clip",
    } <= set(titles)
    assert any(title.startswith("calls with gradient, of ") for title in titles)
    # Lines and bars, each of them with a shape.
    plots = page.locator(".plot")
    for index in range(plots.count()):
        paths = plots.nth(index).locator("path.js-line, .barlayer .point path")
        assert paths.count() > 0
        assert paths.first.get_attribute("d")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 21, 24)"
    assert dark == (scheme == "dark")


def test_hostile_prompts_stay_text(done: Reported, show: Callable[..., Any]) -> None:
    page = show(done.file)
    assert page.title() == "run: tiny"
    assert page.locator("#samples .prompt").all_inner_texts()[2] == EVIL
    assert page.locator("#sorted .prompt").all_inner_texts()[2] == EVIL
    assert page.locator("#samples img").nth(5).get_attribute("alt") == f"step 6: {EVIL}"
    assert f"a warning about {EVIL}" in page.locator("main").inner_text()
    assert page.locator("b").count() == 0


def test_a_run_that_has_just_begun_and_takes_no_samples_has_a_page(
    tmp_path: Path, show: Callable[..., Any]
) -> None:
    run = Reported(tmp_path / "run", PROMPTS)
    run.without_samples()
    run.begin()
    page = show(run.file)
    assert "Step 0 of 6" in page.locator("header").inner_text()
    assert page.locator("img, .plot, #step").count() == 0


def test_the_held_out_pairs_sort(done: Reported, show: Callable[..., Any]) -> None:
    page = show(done.file)
    page.locator("#sort").select_option(label="change of clip, smallest first")
    key = page.locator("#sort").input_value()
    changes = page.eval_on_selector_all("#sorted article", f"a => a.map((b) => +b.dataset.{key})")
    assert len(changes) == 3
    assert changes == sorted(changes)


@pytest.mark.long
def test_a_page_that_is_loaded_while_the_run_writes_is_whole(
    tmp_path: Path, show: Callable[..., Any]
) -> None:
    run = Reported(tmp_path / "run", PROMPTS, steps=1000)
    run.begin()
    run.step(sampled=True)
    ended = threading.Event()
    written: list[int] = []

    def write() -> None:
        while not ended.is_set():
            run.step(sampled=True)
            written.append(run.trainer.step_number)

    writing = threading.Thread(target=write)
    page = show(run.file, plots=False)
    writing.start()
    try:
        seen: list[int] = []
        for _ in range(5):
            page.reload()
            # The script is at the end, and fills the slider when it has read all data.
            text = page.locator("#shown").inner_text()
            assert text.startswith("step ")
            seen.append(int(text.split()[1]))
    finally:
        ended.set()
        writing.join()
    assert seen == sorted(seen)
    assert seen[-1] > seen[0]
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".")]
    drawn(page)


@pytest.mark.long
@pytest.mark.skipif(
    os.environ.get("ALIGNPROP_NO_TIMING") == "1", reason="ALIGNPROP_NO_TIMING=1 is set"
)
def test_a_page_of_500_images_is_painted_within_two_seconds(
    tmp_path: Path, show: Callable[..., Any]
) -> None:
    # Sixteen images of 32 evaluations, each of the size of a photograph's: 13 kB.
    prompts = [f"prompt {i}" for i in range(16)]
    run = Reported(tmp_path / "run", prompts, steps=40, px=320)
    noise = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    found = replace(run.run.sampled, images=noise.repeat(10, axis=1).repeat(10, axis=2))
    frame = frames.make(1, found)
    assert np.mean([len(source) for source in frame.images]) > 13_000
    run.begin()
    for step in range(1, 33):
        frames.write(run.folder / "samples", frame.model_copy(update={"step": step}))
        run.step(sampled=False, held_out={"clip": 0.1})
    run.finish()
    page = show(run.file)
    images = page.evaluate(
        "JSON.parse(document.querySelector('#data').textContent)"
        ".images.steps.reduce((sum, s) => sum + s.images.length, 0)"
    )
    assert images >= 500
    paints = [_first_paint(page)]
    while min(paints) >= 2000.0 and len(paints) < 5:
        page.reload()
        drawn(page)
        paints.append(_first_paint(page))
    assert min(paints) < 2000.0


def _first_paint(page: Any) -> float:
    """Return the milliseconds from opening a page to its first text or image."""
    name = "first-contentful-paint"
    return page.evaluate(f"performance.getEntriesByName('{name}')[0].startTime")


@pytest.mark.long
def test_the_plots_change_with_the_colour_scheme(done: Reported, show: Callable[..., Any]) -> None:
    page = show(done.file)
    line = page.locator(".plot").first.locator("path.js-line").last
    before = line.evaluate("e => getComputedStyle(e).stroke")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        "old => getComputedStyle([...document.querySelector('.plot')"
        ".querySelectorAll('path.js-line')].at(-1)).stroke !== old",
        arg=before,
    )
