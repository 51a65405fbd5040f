"""From what a person names to the runs that are meant, read by as many processes as it takes."""

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from mars_lab.errors import InputError
from mars_lab.report import run_record
from mars_lab.report.run_record import RunRecord

_LARGE = 200e6
"""Bytes of metrics from which several processes read faster than one, their start included."""


def find(places: Sequence[Path]) -> dict[Path, str]:
    """Run folders, by path, with the names to call them by: each of `places`, or all the runs below it.

    Raises:
        InputError: a place that isn't there, or that neither is a run nor holds one.
    """
    found: dict[Path, str] = {}
    for place in places:
        if not place.is_dir():
            raise InputError(f"no run at {place}; name folders of runs, or a folder that holds some")
        folders = sorted(path.parent for path in place.rglob("config.json") if _is_run(path))
        if not folders:
            raise InputError(
                f"{place} is no run and holds none: a run has a config.json with `optimizer` and `train`, as "
                "`mars train` writes it"
            )
        for folder in folders:
            name = place.resolve().name if folder == place else str(folder.relative_to(place))
            if name in found.values():
                name = str(folder)
            found.setdefault(folder.resolve(), name)
    return found


def read_all(folders: dict[Path, str], console: Console) -> list[RunRecord]:
    """Every run of `find`, with a bar on a terminal."""
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        return list(progress.track(_records(folders), total=len(folders), description="reading runs"))


def _records(folders: dict[Path, str]) -> Iterator[RunRecord]:
    num_bytes = sum(path.stat().st_size for folder in folders if (path := folder / "metrics.jsonl").exists())
    num_processes = min(os.cpu_count() or 1, 8)
    if num_bytes < _LARGE or num_processes == 1:
        yield from map(run_record.read, folders.keys(), folders.values())
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads can hang
    with ProcessPoolExecutor(num_processes, context) as pool:
        yield from pool.map(run_record.read, folders.keys(), folders.values())


def _is_run(config: Path) -> bool:
    """Exports for other programs have a config.json, too."""
    if (config.parent / "metrics.jsonl").exists():
        return True
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(values, dict) and {"optimizer", "train"} <= values.keys()
