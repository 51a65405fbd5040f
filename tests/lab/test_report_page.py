"""The page in a browser: skipped where there is no Chromium."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mars_lab.report import page
from mars_lab.report.findings import findings

from .report_runs import record

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium in the PATH")
OPTIMIZERS = ("adamw", "muon", "mars-adamw", "mars-m", "mars-m-exact")


def write_page(path: Path, num_runs: int, num_points: int) -> Path:
    runs = [
        record(OPTIMIZERS[i % 5], i // 10, num_points, lr=0.1 * 2 ** (i // 5 % 2)) for i in range(num_runs)
    ]  # five optimizers, two rates, as many seeds as are needed
    path.write_text(page.render(findings(runs), "A </script><b>title</b>", "today"))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("page") / "report.html", 20, 300)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, path: Path, **options: Any) -> Iterator[Any]:
    """The page at `path`; afterwards, whether it complained or asked for anything but itself."""
    context = browser.new_context(**options)
    shown = context.new_page()
    complaints: list[str] = []
    shown.on("console", lambda message: complaints.append(message.text))
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("request", lambda request: request.url == path.as_uri() or complaints.append(request.url))
    shown.goto(path.as_uri())
    shown.wait_for_selector("html[data-ready]", state="attached", timeout=30_000)
    yield shown
    context.close()
    assert complaints == []


def pixels(shown: Any, series: int) -> int:
    """How many pixels of the curves have exactly the colour of a series (edges are blended)."""
    return shown.evaluate(
        """(series) => {
            const hex = style(`--series-${series}`), canvas = charts[0].canvas;
            const rgb = hex.length === 4 ? [...hex.slice(1)].map((c) => parseInt(c + c, 16))
                : [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
            const { width, height } = canvas;
            const copy = Object.assign(document.createElement("canvas"), { width, height });
            const context = copy.getContext("2d", { willReadFrequently: true });
            context.drawImage(canvas, 0, 0);
            const data = context.getImageData(0, 0, copy.width, copy.height).data;
            let count = 0;
            for (let i = 0; i < data.length; i += 4) if (rgb.every((c, k) => data[i + k] === c)) count++;
            return count;
        }""",
        series,
    )


def test_the_page_needs_no_other_file(small: Path) -> None:
    text = small.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest", text)
    assert "A &lt;/script&gt;&lt;b&gt;title" in text
    assert text.count("</script>") == 2


def test_the_page_stays_small_whatever_the_runs(tmp_path: Path) -> None:
    """A browser reads a few megabytes in well under a second; benchmarks/report_page.py measures it."""
    path = write_page(tmp_path / "large.html", 20, 100_000)
    assert path.stat().st_size < 5e6
    assert "are thinned for display" in path.read_text()


@needs_browser
def test_runs_are_toggled(browser: Any, small: Path) -> None:
    with opened(browser, small) as shown:
        assert pixels(shown, 0) > 50
        optimizer = shown.locator("#legend > li").first
        name = optimizer.locator("b").inner_text()
        optimizer.locator(":scope > label").click()
        assert shown.evaluate("charts[0].visible.map((line) => line.optimizer)").count(name) == 4, (
            "both rates, two seeds"
        )
        optimizer.locator(":scope > label").click()
        assert name not in shown.evaluate("charts[0].visible.map((line) => line.optimizer)")
        assert pixels(shown, 0) == 0
        optimizer.locator("summary").click()
        optimizer.locator("ul label").first.click()
        assert shown.evaluate("charts[0].visible.map((line) => line.optimizer)").count(name) == 1
        assert pixels(shown, 0) > 50
        shown.click("#none")
        assert shown.evaluate("charts[0].visible.length") == 0
        shown.click("#all")
        assert shown.evaluate("charts[0].visible.length") == 20


@needs_browser
def test_axes_and_metrics_are_chosen(browser: Any, small: Path) -> None:
    with opened(browser, small) as shown:
        for axis, last in (("steps", 300), ("seconds", 30), ("tokens", 300 * 4096)):
            shown.click(f"[name=axis][value={axis}]")
            assert shown.evaluate("charts[0].x.range[1]") == pytest.approx(last)
        assert shown.evaluate("charts[0].options.yLabel") == "validation loss"
        shown.click("[name=metric][value=loss]")
        assert shown.evaluate("charts[0].options.yLabel") == "training loss"
        assert shown.evaluate("charts[0].y.range[1]") > 20, "the spike in the second half is in the picture"


@needs_browser
def test_hover_tells_and_dragging_zooms(browser: Any, small: Path) -> None:
    with opened(browser, small) as shown:
        shown.locator("#curves").scroll_into_view_if_needed()
        box = shown.locator("#curves").bounding_box()
        at = shown.evaluate(
            "(() => { const c = charts[0], l = c.visible[0]; return [c.x.pixel(l.x[250]), c.y.pixel(l.y[250])]; })()"
        )
        shown.mouse.move(box["x"] + at[0], box["y"] + at[1])
        tip = shown.locator("#curves .tip")
        assert tip.is_visible()
        assert "step 251" in tip.inner_text()
        assert "lr 0." in tip.inner_text()
        before = shown.evaluate("charts[0].x.range")
        shown.mouse.move(box["x"] + 200, box["y"] + 80)
        shown.mouse.down()
        shown.mouse.move(box["x"] + 300, box["y"] + 200, steps=3)
        shown.mouse.up()
        zoomed = shown.evaluate("charts[0].x.range")
        assert zoomed[1] - zoomed[0] < 0.3 * (before[1] - before[0])
        shown.mouse.dblclick(box["x"] + 200, box["y"] + 80)
        assert shown.evaluate("charts[0].x.range") == before
        shown.locator("#curves canvas").nth(1).press("+")
        keyed = shown.evaluate("charts[0].x.range")
        assert keyed[1] - keyed[0] == pytest.approx(0.5 * (before[1] - before[0]))


@needs_browser
def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Any, small: Path) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
    with opened(browser, small, **phone) as shown:
        assert shown.evaluate("document.documentElement.scrollWidth") <= 360
        assert shown.evaluate("charts[0].canvas.width === 2 * charts[0].box.clientWidth")
        shown.locator("#legend > li label").first.tap()
        assert shown.evaluate("charts[0].visible.length") == 10 + 2


@needs_browser
def test_dark_and_print(browser: Any, small: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, small, color_scheme="dark") as shown:
        assert shown.evaluate(background) == "rgb(22, 24, 28)"
        assert pixels(shown, 0) > 50
        shown.emulate_media(media="print")
        assert shown.evaluate(background) == "rgb(255, 255, 255)"
        assert shown.evaluate("style('--series-0')") == "#0072b2"
        assert pixels(shown, 0) > 50, "the curves are drawn anew for paper"
        assert not shown.locator("#reset").is_visible()


@needs_browser
def test_two_hundred_runs_of_a_hundred_thousand_points(browser: Any, tmp_path: Path) -> None:
    path = write_page(tmp_path / "large.html", 200, 100_000)
    with opened(browser, path) as shown:
        shown.click("#all")
        assert shown.evaluate("charts[0].visible.length") == 200
        assert max(shown.evaluate("charts[0].lines.map((line) => Math.max(...line.y))")) == 20, "the spike is kept"
