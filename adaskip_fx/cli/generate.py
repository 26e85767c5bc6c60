"""``adaskip-fx generate``: answer one prompt, token by token."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    Alpha,
    AsJson,
    Backend,
    Debug,
    Device,
    Dtype,
    Model,
    PlanFile,
    ProfileFolder,
    TableFile,
    TimedContext,
)
from .reporting import print_json, reported

if TYPE_CHECKING:
    from ..model.load import Loaded
    from ..profiles.profile import Profile
    from ..speculation.options import Lossless


def generate(
    model: Model,
    profile: ProfileFolder,
    prompt: Annotated[str | None, typer.Argument(help="What to answer.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Read the prompt from this file; - is standard input.")
    ] = None,
    alpha: Alpha = 1.2,
    context: TimedContext = None,
    table: TableFile = None,
    plan: PlanFile = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 64,
    chat: Annotated[
        bool, typer.Option(help="Put the prompt into the tokenizer's chat template, if any.")
    ] = True,
    lossless: Annotated[
        bool,
        typer.Option("--lossless", help="The full model's answer: what is skipped only drafts."),
    ] = False,
    max_divergence: Annotated[
        float | None,
        typer.Option(help="Lossy up to this many nats a token on average; the full model checks."),
    ] = None,
    verify_share: Annotated[
        float | None,
        typer.Option(
            help="The share of blocks that the full model checks; of the others the divergence is "
            "estimated. Needs --max-divergence, and a plan that skips no attention."
        ),
    ] = None,
    backend: Backend = "inductor",
    dtype: Dtype = None,
    device: Device = "auto",
    stats: Annotated[bool, typer.Option("--stats", help="Print what it did to stderr.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Answer a prompt greedily with sublayers skipped, token by token.

    With --json the answer is printed when it is complete.
    """
    if (prompt is None) == (prompt_file is None):
        raise typer.BadParameter("give a prompt, either as argument or with --prompt-file")
    decoding = _decoding(lossless, max_divergence, verify_share)
    with reported(debug) as steps:
        from ..model.load import load, usable_backend
        from ..profiles.profile import Profile

        words = prompt if prompt is not None else _read(prompt_file)
        measured = Profile.load(profile)
        with steps.step("load the model"):
            loaded = load(model, device, dtype)
        usable, reason = usable_backend(backend, loaded.model.device)
        if reason is not None:
            steps.say(reason)
        options: dict[str, Any] = {"alpha": alpha, "limit": max_new_tokens, "plan": plan}
        options |= {"context": context, "table": table, **decoding}
        options |= {"backend": usable, "chat": chat, "stream": not as_json}
        answer, report = answer_prompt(loaded, measured, words, **options)
        if as_json:
            print_json(asdict(answer))
        if stats:
            steps.say(report)


def _decoding(
    lossless: bool, max_divergence: float | None, verify_share: float | None
) -> dict[str, Any]:
    """Return how the full model verifies the answer, as an option; nothing where it does not."""
    if verify_share is not None and max_divergence is None:
        raise typer.BadParameter(
            "--verify-share is for --max-divergence, which it estimates; give both, or leave it out"
        )
    if not lossless and max_divergence is None:
        return {}
    if lossless and max_divergence is not None:
        raise typer.BadParameter("give --lossless or --max-divergence, not both")
    from ..speculation.options import Bounded, Lossless

    try:
        share = 1.0 if verify_share is None else verify_share
        made = (
            Lossless()
            if max_divergence is None
            else Bounded(max_divergence=max_divergence, verify_share=share)
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return {"decoding": made}


def _read(path: Path | None) -> str:
    from ..utils.files import read_text

    assert path is not None
    return sys.stdin.read() if str(path) == "-" else read_text(path)


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt.

    Attributes:
        model: the name that the model was asked for by.
        plan: digest of the plan that the request began with.
        text: what was generated.
        prompt_tokens: tokens of the prompt, those of a chat template included.
        new_tokens: tokens that were generated.
        seconds: time of ``generate``, with what it had to compile.
        tokens_per_step: of drafts that the full model verified; None without.
    """

    model: str
    plan: str
    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    tokens_per_step: float | None = None


def answer_prompt(
    loaded: Loaded,
    profile: Profile,
    prompt: str,
    *,
    alpha: float,
    limit: int,
    backend: str,
    chat: bool,
    plan: Path | None = None,
    context: int | None = None,
    table: Path | None = None,
    decoding: Lossless | None = None,
    stream: bool = True,
) -> tuple[Answer, str]:
    """Answer a prompt greedily.

    Args:
        loaded: the model and its tokenizer.
        profile: the model's.
        prompt: what to answer.
        alpha: acceleration ratio.
        limit: new tokens at most.
        backend: inner torch.compile backend.
        chat: use the tokenizer's chat template if it has one.
        plan: a fitted plan's file; `alpha` is not looked at then.
        context: tokens at which alpha counts time; None where it counts sublayers.
        table: the file of a latency table, for `context`.
        decoding: how the full model verifies what is skipped; None: it does not.
        stream: print the answer to stdout as it comes.

    Returns:
        The answer, and a report of what the compiled model did.

    Raises:
        ValueError: the prompt is empty, or the profile, `alpha` or the plan cannot be used.
    """
    import torch
    from transformers import TextStreamer

    from ..data.reference_text import prompt_ids

    tokenizer = loaded.tokenizer
    tokens = prompt_ids(tokenizer, prompt) if chat else tokenizer(prompt)["input_ids"]
    if not tokens:
        raise ValueError("the prompt is empty")
    how = {"backend": backend, "context": context, "table": table, "decoding": decoding}
    fast = _compiled(loaded, profile, alpha, plan, **how)
    ids = torch.tensor([tokens], device=loaded.model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options: dict[str, Any] = {"max_new_tokens": limit, "streamer": streamer if stream else None}
    options |= {"do_sample": False, "return_dict_in_generate": True}  # the request stays alive
    start = time.perf_counter()
    output = fast.generate(ids, attention_mask=torch.ones_like(ids), **options)
    seconds, new = time.perf_counter() - start, output.sequences[0, len(tokens) :].tolist()
    text = tokenizer.decode(new, skip_special_tokens=True)
    drafts = fast.adaskip.drafts
    told = fast.adaskip.plan.digest, text, len(tokens), len(new), seconds
    per_step = drafts.tokens_per_step if drafts is not None else None
    return Answer(loaded.name, *told, per_step), str(fast.adaskip)


def _compiled(
    loaded: Loaded, profile: Profile, alpha: float, plan: Path | None, **options: Any
) -> Any:
    """Return the compiled model, whose policy adds to a fitted plan if one is given."""
    from .. import api
    from ..plans.skip_plan import SkipPlan
    from ..policies import Fitted

    policy = Fitted(SkipPlan.load(plan)) if plan is not None else None
    return api.compile(loaded.model, profile, alpha, policy=policy, **options)
