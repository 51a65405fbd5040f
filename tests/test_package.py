"""What the package promises about itself: imports, documents whose code runs, no machine's paths."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """Every fenced code block of a language, with the document it stands in."""
    found: list[tuple[str, str]] = []
    for document in DOCUMENTS:
        for code in re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
            found.append((f"{document.name}-{len(found)}", code))
    return found


def test_importing_the_library_imports_torch_only() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import mars_optim\n"
        "roots = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(','.join(sorted(r for r in roots if r not in sys.stdlib_module_names)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "mars_optim"


@pytest.mark.parametrize("code", [pytest.param(code, id=name) for name, code in blocks("python")])
def test_python_blocks_of_the_documents_run(code: str, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
