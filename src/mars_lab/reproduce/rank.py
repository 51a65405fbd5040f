"""One of the processes that train a run together: `python -m mars_lab.reproduce.rank FOLDER`, started by a launcher."""

import os
import sys
from pathlib import Path

from mars_lab.errors import reported
from mars_lab.sweep.attempt import attempt
from mars_lab.training.allocator import keep_freed_memory
from mars_lab.training.interruption import Interrupted
from mars_lab.training.run_folder import RunFolder


def main() -> None:
    """Train the run in the folder that the command line names, together with the others."""
    keep_freed_memory()
    with reported(f"mars (rank {os.environ['RANK']})"):
        try:
            attempt(RunFolder(Path(sys.argv[1])))
        except Interrupted as interrupted:
            sys.exit(interrupted.exit_code)


if __name__ == "__main__":
    main()
