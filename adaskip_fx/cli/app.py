"""The command line: ``adaskip-fx --help`` names its commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import typer

from .bench import bench
from .calibrate import calibrate
from .demo.command import demo
from .doctor import doctor
from .evaluate import evaluate
from .export import export
from .fit import fit
from .generate import generate
from .inspect import inspect
from .measure import measure
from .windows import windows

EXIT_CODES = (
    "0  The work is done.",
    "1  The work failed or was refused: a file that is missing, a model that cannot be compiled.",
    "2  The command line is wrong: an unknown option, a value out of range.",
    "130  It was interrupted.",
)


@dataclass(frozen=True)
class Command:
    """One command of the program.

    Attributes:
        function: what it does; its docstring and parameters make up the help.
        summary: what the list of commands says, in at most 60 characters.
        examples: calls that show what it is for.
    """

    function: Callable[..., None]
    summary: str
    examples: tuple[str, ...]


COMMANDS: dict[str, Command] = {
    "demo": Command(
        demo,
        "Show AdaSkip on a real model.",
        ("adaskip-fx demo", "adaskip-fx demo --model ./llama --alpha 1.3 --json"),
    ),
    "doctor": Command(
        doctor,
        "Say what is installed and whether a model can be used.",
        ("adaskip-fx doctor HuggingFaceTB/SmolLM2-135M-Instruct",),
    ),
    "calibrate": Command(
        calibrate,
        "Measure how much each sublayer matters: a profile.",
        ("adaskip-fx calibrate ./llama llama.adaskip --text book.txt --max-length 4096",),
    ),
    "fit": Command(
        fit,
        "Make a plan that loses less, from texts.",
        (
            "adaskip-fx fit ./llama llama.adaskip plan.json --text prose=book.txt",
            "adaskip-fx fit ./llama llama.adaskip plan.json --no-search --own 0 --steps 0",
        ),
    ),
    "windows": Command(
        windows,
        "Make a plan whose attention sees windows, from texts.",
        (
            "adaskip-fx windows ./llama plan.json --text prose=book.txt --window 2048 --alpha 1.5",
            "adaskip-fx windows ./llama plan.json --layers --table table.json --alpha 1.1",
        ),
    ),
    "inspect": Command(
        inspect,
        "Show a profile, a plan or a latency table.",
        (
            "adaskip-fx inspect llama.adaskip --alpha 1.2",
            "adaskip-fx inspect plan.json --graph --model ./llama",
        ),
    ),
    "generate": Command(
        generate,
        "Answer a prompt with sublayers skipped.",
        (
            'adaskip-fx generate ./llama llama.adaskip "Why is the sky blue?" --stats',
            "adaskip-fx generate ./llama llama.adaskip --plan plan.json --prompt-file - < long.txt",
        ),
    ),
    "eval": Command(
        evaluate,
        "Measure on tasks what skipping costs.",
        (
            "adaskip-fx eval ./llama llama.adaskip --task perplexity --task passkey",
            "adaskip-fx eval ./llama --plan plan.json --json > result.json",
        ),
    ),
    "bench": Command(
        bench,
        "Time prompts and decode steps, with and without a plan.",
        (
            "adaskip-fx bench ./llama llama.adaskip --context 2048 --context 8192",
            "adaskip-fx bench ./llama --plan plan.json --eager --json > times.json",
        ),
    ),
    "measure": Command(
        measure,
        "Measure what each sublayer costs, for budgets of time.",
        (
            "adaskip-fx measure ./llama table.json --context 1024 --context 8192",
            "adaskip-fx measure ./llama table.json --context 32768 --window 2048",
        ),
    ),
    "export": Command(
        export,
        "Print or write a plan in the form in which something else takes it.",
        (
            "adaskip-fx export --vllm plan.json",
            "adaskip-fx export --vllm plan.json --phase prefill",
            "adaskip-fx export plan.json --checkpoint ./smaller --model ./llama",
        ),
    ),
}


def _epilog(title: str, lines: tuple[str, ...]) -> str:
    """Lines that the help shows as they are, below the options."""
    return "\b\n" + "\n".join([f"{title}:", *(f"  {line}" for line in lines)])


def _made() -> typer.Typer:
    made = typer.Typer(
        help="AdaSkip (arXiv 2501.02336) for Hugging Face decoders: skip the sublayers that "
        "matter least, learned from your texts and while decoding.",
        epilog=_epilog("Exit status", EXIT_CODES),
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # help and errors are plain text, whole lines and quick
    )
    for name, command in COMMANDS.items():
        title = "Example" if len(command.examples) == 1 else "Examples"
        epilog = _epilog(title, command.examples)
        made.command(name, short_help=command.summary, epilog=epilog)(command.function)
    return made


app = _made()
