"""Engines in processes of their own, that are timed in turn."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from .contender import Load


class Contender(Protocol):
    """An engine that waits to be timed."""

    described: dict[str, Any]  #: what is known of it before it is timed

    def round(self) -> dict[str, float]:
        """What it takes to answer all requests once."""
        ...

    def stop(self) -> None:
        """Let go of it."""
        ...


class Running:
    """A contender's process."""

    def __init__(self, name: str, folder: Path, load: Load) -> None:
        call = json.dumps({"name": name, "folder": str(folder), "load": asdict(load)})
        self._log = folder / f"{name}.log"
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.vllm_serving.contender", call],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.described = self._answer()

    def _answer(self) -> dict[str, Any]:
        """The next result that the process prints."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
                return found
        self._process.wait()
        raise RuntimeError(
            f"{self._log.stem}: the engine did not run: {self._log.read_text()[-2000:]}"
        )

    def round(self) -> dict[str, float]:
        assert self._process.stdin is not None
        print("round", file=self._process.stdin, flush=True)
        return self._answer()

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # it reads no more rounds, and ends
        self._process.wait()


def timed(
    groups: Sequence[Sequence[str]], start: Callable[[str], Contender], rounds: int
) -> dict[str, tuple[dict[str, Any], list[dict[str, float]]]]:
    """What is known of each contender, and its rounds; one round is not counted.

    Contenders of a group are there together and take turns, each turn begun by another one, so
    that what else the machine does meets all of them.
    """
    found: dict[str, tuple[dict[str, Any], list[dict[str, float]]]] = {}
    for group in groups:
        running: dict[str, Contender] = {}
        try:
            for name in group:
                running[name] = start(name)
                found[name] = running[name].described, []
                running[name].round()
            for turn in range(rounds):
                first = turn % len(group)
                for name in (*group[first:], *group[:first]):
                    found[name][1].append(running[name].round())
        finally:
            for contender in running.values():
                contender.stop()
    return found
