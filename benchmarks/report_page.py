"""How long the page of `mars report` takes to open in Chromium, from nothing to the first curves drawn.

    python benchmarks/report_page.py [--runs 200] [--points 100000] [--out FILE.json]

The runs are made up in memory; the page is what `mars report` writes for such runs. Needs playwright and a chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import surroundings
from playwright.sync_api import sync_playwright

from mars_lab.report import page
from mars_lab.report.findings import findings

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from lab.report_runs import record

OPTIMIZERS = ("adamw", "muon", "mars-adamw", "mars-lion", "mars-shampoo", "mars-m", "mars-m-exact", "mars-lion-exact")
DEVICES = {"desktop": {}, "phone": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 3}}


def write_page(path: Path, num_runs: int, num_points: int) -> None:
    """Runs of eight optimizers at eight learning rates."""
    runs = [record(OPTIMIZERS[i % 8], i // 8, num_points, lr=0.1 * 2 ** min(i // 8, 7)) for i in range(num_runs)]
    path.write_text(page.render(findings(runs), "Two hundred runs", "for a benchmark"), encoding="utf-8")


def seconds_to_open(browser: Any, path: Path, options: dict[str, Any]) -> dict[str, float]:
    """Once, in a new profile: opening, then drawing all runs instead of those shown at first."""
    context = browser.new_context(**options)
    shown = context.new_page()
    begin = time.perf_counter()
    shown.goto(path.as_uri())
    shown.wait_for_selector("html[data-ready]", state="attached")
    shown.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    opened = time.perf_counter() - begin
    begin = time.perf_counter()
    shown.click("#all")
    shown.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    context.close()
    return {"open": opened, "show_all": time.perf_counter() - begin}


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "report.html"
        write_page(path, options.runs, options.points)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, device in DEVICES.items():
            times = [seconds_to_open(browser, path, device) for _ in range(options.repeats)]
            results[name] = {
                key: {"median": statistics.median(t[key] for t in times), "highest": max(t[key] for t in times)}
                for key in times[0]
            }
        results |= {"runs": options.runs, "points": options.points, "page_bytes": path.stat().st_size}
        results |= {"chromium": browser.version, "repeats": options.repeats, **surroundings("cpu")}
    text = json.dumps(results, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
