"""Runs the native kernels under the sanitizers: memory and undefined behaviour, then data races.

    python tests/sanitize.py [compiler]

Builds the kernels and `sanitize_driver.cpp` into a program of their own, without Python or torch, so that every report
is about the kernels. Exits with 1 at the first report.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src" / "mars_optim" / "native" / "csrc"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fno-omit-frame-pointer",
    "-pthread",
    "-DMARS_NO_STREAM",  # no sanitizer sees what goes past the cache
]
RUNS = {
    # A float that overflows an integer is undefined; one that overflows a float is infinite.
    "memory": ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"],
    # Nor does this one see a copy that the compiler spells out.
    "races": ["-fsanitize=thread", "-fno-builtin-memcpy"],
}


def main() -> int:
    compiler = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("CXX", "g++")
    sources = [*sorted(str(path) for path in SOURCES.glob("*.cpp")), str(ROOT / "tests" / "sanitize_driver.cpp")]
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in RUNS.items():
            program = str(Path(folder) / name)
            subprocess.run([compiler, *FLAGS, *flags, f"-I{SOURCES}", *sources, "-o", program], check=True)
            result = subprocess.run([program, name], env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"})
            print(f"{name}: {'clean' if result.returncode == 0 else 'REPORTS'}")
            if result.returncode:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
