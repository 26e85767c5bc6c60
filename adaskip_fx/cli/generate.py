"""Answer one prompt from the command line, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from .. import api
from ..data.reference_text import prompt_ids
from ..model.load import Loaded
from ..plans.skip_plan import SkipPlan
from ..policies import Fitted
from ..profiles.profile import Profile


def stream(
    loaded: Loaded,
    profile: Profile,
    prompt: str,
    *,
    alpha: float,
    limit: int,
    backend: str,
    chat: bool,
    plan: Path | None = None,
) -> tuple[Any, Any]:
    """Print a greedy answer to stdout as it comes.

    Args:
        loaded, profile: the model, its tokenizer and its profile.
        prompt: what to answer.
        alpha: acceleration ratio.
        limit: new tokens at most.
        backend: inner torch.compile backend.
        chat: use the tokenizer's chat template if it has one.
        plan: of a fitted plan's file; `alpha` is not looked at then.

    Returns:
        The compiled model and what its ``generate`` returned, with the request's cache.
    """
    tokenizer = loaded.tokenizer
    policy = Fitted(SkipPlan.load(plan)) if plan is not None else None
    fast = api.compile(loaded.model, profile, alpha, policy=policy, backend=backend)
    tokens = prompt_ids(tokenizer, prompt) if chat else tokenizer(prompt)["input_ids"]
    if not tokens:
        raise ValueError("the prompt is empty")
    ids = torch.tensor([tokens], device=loaded.model.device)
    output = fast.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=limit,
        do_sample=False,
        return_dict_in_generate=True,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    return fast, output
