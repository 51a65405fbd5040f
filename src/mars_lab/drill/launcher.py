"""`python -m mars_lab.drill.launcher RUN FAULT`: `mars train --resume RUN --nproc 2` with a fault in it."""

import os
import sys
from pathlib import Path

from mars_lab.drill.faults import FaultyTask
from mars_lab.errors import reported
from mars_lab.training import elastic, launch
from mars_lab.training.interruption import Interrupted
from mars_lab.training.processes import were_launched
from mars_lab.training.run_folder import RunFolder


def _main(path: Path, fault: str) -> None:
    try:
        if were_launched():
            launch.resume(RunFolder(path), open_task=lambda config: FaultyTask(config, fault, path))
        else:
            elastic.launch(("-m", "mars_lab.drill.launcher", str(path), fault), 2, max_restarts=1)
    except Interrupted as interrupted:
        print(f"{str(interrupted).capitalize()}. Continue with: mars train --resume {path}", file=sys.stderr)
        sys.exit(interrupted.exit_code)


if __name__ == "__main__":
    with reported(f"mars (rank {os.environ['RANK']})" if were_launched() else "mars"):
        _main(Path(sys.argv[1]), sys.argv[2])
