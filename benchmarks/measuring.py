"""What benchmarks share: interleaved timing, what they ran on, and results as JSON and a table."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the repetitions of one thing, or what they are in proportion to another's."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    each: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"

    def __truediv__(self, other: Timing) -> Timing:
        """Return the quotients round by round: a memory that is slow for a while is so for both."""
        return timing([mine / its for mine, its in zip(self.each, other.each, strict=True)])


def timing(times: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0],) * 3
    return Timing(median, low, high, tuple(times))


def interleaved(
    runs: Mapping[str, Callable[[], None]],
    repeats: int,
    *,
    prepare: Callable[[str], None] = lambda name: None,
    device: torch.device | str = "cpu",
    warm_up: int = 2,
) -> dict[str, Timing]:
    """Time each of `runs` once a round, so that what disturbs the machine disturbs them all alike.

    Args:
        runs: what to time.
        repeats: rounds that count.
        prepare: runs before each, untimed, with its name.
        device: where the work happens; its queue is empty before and after.
        warm_up: rounds before those that count.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(warm_up + repeats):
        for name, run in runs.items():
            prepare(name)
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if i >= warm_up:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: timing(of_run) for name, of_run in times.items()}


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def surroundings(device: torch.device | str) -> dict[str, Any]:
    """Return what a figure depends on besides the code."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    is_cuda = torch.device(device).type == "cuda"
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if is_cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]} ({len(models)} cores)" if models else platform.processor() or platform.machine()


def copy_bandwidth(device: torch.device | str, num_bytes: int = 1 << 29) -> float:
    """Return the bytes a second that a pass over memory in place reads and writes."""
    x = torch.ones(num_bytes // 4, device=device)
    result = interleaved({"copy": lambda: x.mul_(1.0)}, 9, device=device)
    return 2 * num_bytes / (result["copy"].median / 1e3)


def write(
    name: str, where: dict[str, Any], sections: Mapping[str, Sequence[Mapping[str, Any]]], notes: str = ""
) -> Path:
    """Write `results/<name>_<hardware>_<date>.json` and a table of the same name; return the table's path."""
    RESULTS.mkdir(exist_ok=True)
    hardware = "-".join("".join(c if c.isalnum() else " " for c in where["device"].lower()).split()[:3])
    path = RESULTS / f"{name}_{hardware}_{where['date']}.md"
    plain = {title: [_plain(row) for row in rows] for title, rows in sections.items()}
    path.with_suffix(".json").write_text(json.dumps({"where": where, "sections": plain}, indent=1) + "\n")
    text = [
        f"# {name}, {where['date']}",
        "",
        ", ".join(f"{key} {value}" for key, value in where.items()),
        "",
        notes,
        "",
    ]
    for title, rows in sections.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text += [f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        text += ["| " + " | ".join(cell(row.get(column, "")) for column in columns) + " |" for row in rows] + [""]
    path.write_text("\n".join(text))
    return path


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _summary(value) if isinstance(value, Timing) else value for key, value in row.items()}


def _summary(timing: Timing) -> dict[str, float]:
    return {"median": timing.median, "low": timing.low, "high": timing.high, "repeats": len(timing.each)}


def cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
