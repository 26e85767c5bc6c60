"""Two processes that run `worker` together, over gloo on one machine, and what they found."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RANKS = 2


@dataclass(frozen=True)
class Found:
    """What each rank wrote of each check, and how the processes ended.

    Attributes:
        results: by rank, by the name of a check.
        codes: the exit codes.
        errors: what each wrote to stderr.
    """

    results: tuple[dict[str, Any], ...]
    codes: tuple[int | None, ...]
    errors: tuple[str, ...]

    def of(self, check: str) -> list[Any]:
        """The results of a check on all ranks; AssertionError with the traceback if it failed."""
        for rank, results in enumerate(self.results):
            assert check in results, f"rank {rank} did not come to {check}:\n{self.errors[rank]}"
            failed = isinstance(results[check], dict) and results[check].get("traceback")
            assert not failed, f"rank {rank}:\n{failed}"
        return [results[check] for results in self.results]


def run(folder: Path, *checks: str, seconds: float = 400, ranks: int = RANKS) -> Found:
    """Run checks of `worker` in some processes; whoever is not through in time is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, logs = [], [folder / f"stderr-{rank}" for rank in range(ranks)]
    for rank in range(ranks):
        surroundings = {
            **os.environ,
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            **{"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "passes"), *sys.path[1:]])},
        }
        with logs[rank].open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.distributed.worker", str(folder), *checks],
                    cwd=ROOT,
                    env=surroundings,
                    stdout=log,
                    stderr=log,
                )
            )
    until = time.monotonic() + seconds
    try:  # all are looked at: the others ask whether one has ended
        while any([p.poll() is None for p in processes]) and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        codes = tuple(process.poll() for process in processes)
        for process in processes:
            process.kill()
            process.wait()
    written = (folder / f"results-{rank}.json" for rank in range(ranks))
    results = tuple(json.loads(f.read_text()) if f.is_file() else {} for f in written)
    return Found(results, codes, tuple(log.read_text()[-6000:] for log in logs))
