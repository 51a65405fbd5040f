"""What the package promises about itself: imports, documents whose code runs, no machine's paths."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from images_at_hand import REAL as REAL_IMAGES
from images_at_hand import archive_files, write_folder
from tokenizers_at_hand import CACHE

ROOT = Path(__file__).parent.parent
REAL_BOOKS = ROOT / ".." / "shared" / "data" / "books"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """Every fenced code block of a language, with the document it stands in."""
    found: list[tuple[str, str]] = []
    for document in DOCUMENTS:
        for code in re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
            found.append((f"{document.name}-{len(found)}", code))
    return found


def data_of(document: Path, folder: Path) -> dict[str, str]:
    """Variables that say where a tutorial's data are: the real ones where this machine has them."""
    if document.name == "tutorial.md" and REAL_BOOKS.is_dir():
        return {"BOOKS": str(REAL_BOOKS)}
    if document.name != "tutorial-images.md":
        return {}
    if REAL_IMAGES.is_dir():
        return {"CIFAR": str(REAL_IMAGES)}
    write_folder(folder / "made-up", archive_files(10)[0])
    return {"CIFAR": str(folder / "made-up")}


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if "```bash" in d.read_text(encoding="utf-8")], ids=lambda d: d.name
)
def test_commands_of_a_document_run_in_order(document: Path, tmp_path: Path) -> None:
    """All in one empty folder. Of `make` targets only the existence is checked here; CI runs them."""
    lines = "\n".join(code for name, code in blocks("bash") if name.startswith(document.name)).splitlines()
    make_lines = [line for line in lines if line.startswith("make ")]
    for line in make_lines:
        subprocess.run(["make", "-n", "-C", str(ROOT), line.split()[1]], check=True, capture_output=True)
    script = "\n".join(line for line in lines if line not in make_lines)
    if "mars prepare" in script and CACHE is None:
        pytest.skip("no copy of GPT-2's tokenizer; set TIKTOKEN_CACHE_DIR to one")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **data_of(document, tmp_path)}
    (tmp_path / "empty").mkdir()
    result = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_block_is_run_by_a_test() -> None:
    fences = [line for d in DOCUMENTS for line in d.read_text(encoding="utf-8").splitlines() if line.startswith("```")]
    assert set(fences) <= {"```python", "```bash", "```"}
    opening = [fence for fence in fences if fence != "```"]
    assert len(opening) == len(fences) / 2, "a code block without a language is run by nobody"


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
