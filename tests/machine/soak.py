"""Random sequences for as long as is asked, in many processes: how many were run, what failed.

``python -m tests.machine.soak --seconds 500`` drives every structure of the state machine with the
soak profile's rules, prints a table, and ends with status 1 if anything was different.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

#: Sequences that one seed stands for; shapes that torch keeps are let go in between.
_OF_A_SEED = 60


@dataclass
class Count:
    """What one process has done.

    Attributes:
        structure: which decoder.
        sequences: how many were run.
        answered, refused: calls in them that gave a value, and that were refused as they must be.
        failures: of each seed that failed the seed and the end of its traceback.
    """

    structure: str
    sequences: int = 0
    answered: int = 0
    refused: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)


class _TimeIsUpError(BaseException):
    """Leaves hypothesis, which would take an `Exception` for a failure."""


def soak(structure: str, seed: int, seconds: float) -> Count:
    """Run sequences of one structure, from `seed` on, until the time is up.

    A sequence that fails is not shrunk: `seed` is enough to have it again, where that is cheaper.
    """
    # read when this is a process of its own, with the profile that `main` has chosen
    import hypothesis
    from hypothesis.stateful import run_state_machine_as_test

    from tests import conftest
    from tests.machine import test_state_machine

    warnings.simplefilter("ignore")
    end, count = time.monotonic() + seconds, Count(structure)
    options = hypothesis.settings(
        test_state_machine._settings(),
        max_examples=_OF_A_SEED,
        phases=[hypothesis.Phase.generate],
        database=None,
    )

    class Machine(test_state_machine.Machine):
        def teardown(self) -> None:
            count.sequences += 1
            count.answered += self.world.answered
            count.refused += self.world.refused
            super().teardown()
            if time.monotonic() > end:
                raise _TimeIsUpError

    Machine.structure = structure
    while True:
        try:
            run_state_machine_as_test(hypothesis.seed(seed)(Machine), settings=options)
        except _TimeIsUpError:
            return count
        except Exception as error:
            count.failures.append((seed, "".join(traceback.format_exception(error))[-6000:]))
        seed += 1
        conftest.pytest_runtest_teardown()
        gc.collect()


def table(counts: Iterable[Count]) -> str:
    """A line for each structure, the sum, and what failed."""
    by_name: dict[str, list[Count]] = {}
    for count in counts:
        by_name.setdefault(count.structure, []).append(count)
    rows = [("structure", "sequences", "answered", "refused", "failed")]
    every = [c for group in by_name.values() for c in group]
    for name, group in (*by_name.items(), ("all", every)):
        columns = ([getattr(c, n) for c in group] for n in ("sequences", "answered", "refused"))
        failed = sum(len(c.failures) for c in group)
        rows.append((name, *(f"{sum(column):,}" for column in columns), str(failed)))
    lines = [f"{name:<20}" + "".join(f"{cell:>12}" for cell in cells) for name, *cells in rows]
    lines += [
        f"\n{count.structure}, seed {seed}: {text}"
        for count in every
        for seed, text in count.failures
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.machine.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="for each process")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0, help="of the first; each has a thousand")
    parser.add_argument("--out", help="a JSON file for the counts")
    given = parser.parse_args(arguments)
    os.environ |= {"HYPOTHESIS_PROFILE": "soak", "OMP_NUM_THREADS": "1"}
    from tests.machine.structures import STRUCTURES

    names = [[*STRUCTURES][i % len(STRUCTURES)] for i in range(given.processes)]
    seeds = [given.seed + 1000 * i for i in range(given.processes)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.processes, mp_context=spawn) as pool:
        counts = list(pool.map(soak, names, seeds, [given.seconds] * given.processes))
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(f"{versions}; {given.processes} processes, {given.seconds:g} s each\n{table(counts)}")
    if given.out:
        result: dict[str, Any] = {"versions": versions, "counts": [asdict(c) for c in counts]}
        with open(given.out, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
    if any(count.failures for count in counts):
        sys.exit(1)


if __name__ == "__main__":
    main()
