"""`mars report`: from run folders to a page, figures and a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import tyro
from rich.console import Console

from mars_lab.report import discovery, figures, page, tables
from mars_lab.report.findings import Findings, findings
from mars_lab.report.tables import Table

PAGE, RESULTS = "report.html", "results.md"


@dataclass(frozen=True)
class ReportCommand:
    """Compare runs: one page for the browser that needs no other file, figures, and a table."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or folders that hold some, for example that of a sweep."""
    out: Path = Path("report")
    """Folder that gets report.html, results.md and the figures; files of these names are replaced."""
    baseline: str | None = None
    """Optimizer that the others are measured against; by default adamw, where it is among them."""
    title: str = "Optimizers compared"
    """Heading of the page."""


def run(command: ReportCommand) -> Findings:
    """Read the runs and write everything into `command.out`."""
    found = findings(discovery.read_all(discovery.find(command.runs), Console()), command.baseline)
    write(found, command.out, command.title)
    return found


def write(found: Findings, out: Path, title: str, extra: Sequence[tuple[str, Table, str]] = ()) -> None:
    """Page, figures and table of `found` into the folder `out`; `extra` as in `page.render`."""
    out.mkdir(parents=True, exist_ok=True)
    figures.draw(found, out)
    _replace(out / PAGE, page.render(found, title, f"on {date.today().isoformat()}", extra))
    parts = [tables.results(found).markdown()] if found.results else []
    parts += [f"{heading}\n\n{table.markdown()}\n{note}\n" for heading, table, note in extra]
    _replace(out / RESULTS, "\n".join(parts))


def _replace(path: Path, text: str) -> None:
    """Write a file so that it exists whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
