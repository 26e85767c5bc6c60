"""From texts to a plan whose windows lose the least: nothing is trained.

Heads, or layers, are judged on the texts, and on questions about what is hidden in them: text alone
does not miss a head that retrieves. Only questions count that the full model can answer, by how far
the plan's answers are from the full model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from adaskip_fx.api import build
from adaskip_fx.calibration.loss import CalibrationLoss
from adaskip_fx.calibration.tokenizer import Tokenizer
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.windows import Window
from adaskip_fx.policies import Windowed
from adaskip_fx.profiles.fingerprint import fingerprint

from .retrieval_prompts import retrieval_samples
from .session import Kinds, Say, answer_start, tokenized

if TYPE_CHECKING:
    from adaskip_fx.latency.table import LatencyTable
    from adaskip_fx.latency.terms import Weights

_DRAWN = 4  # questions, for one that is taken


@dataclass(frozen=True)
class WindowRecipe:
    """How windows are chosen.

    Attributes:
        per: whether to choose K/V heads, or whole layers.
        max_length: tokens of a text at most; those of a question's prompt.
        questions: how many to ask.
        text_weight: of the loss of texts, against that of questions, which is larger.
        shortlist: units that are judged again at each step, at most; see `Windowed`.
        start: where the search begins; where fewer steps lead to the plan if None.
        context: tokens stored, at which `alpha` counts; `max_length` if None.
        table: where there is one, `alpha` counts the time that it predicts.
        phase: in which phase that is.
        seed: of all random choices.
    """

    per: Literal["head", "layer"] = "head"
    max_length: int = 4096
    questions: int = 16
    text_weight: float = 4.0
    shortlist: int = 4
    start: Literal["full", "windowed"] | None = None
    context: int | None = None
    table: LatencyTable | None = None
    phase: Weights = "decode"
    seed: int = 0


def choose_windows(
    model: Any,
    tokenizer: Tokenizer,
    texts: Kinds,
    alpha: float,
    window: Window,
    recipe: WindowRecipe | None = None,
    *,
    backend: str = "eager",
    say: Say = lambda _: None,
) -> SkipPlan:
    """Return a plan that skips nothing and gives windows where they lose least.

    Args:
        model: a transformers decoder in evaluation mode; it is not changed.
        tokenizer: the model's.
        texts: by kind (prose, code, ...), longer than the window, close to what the model will be
            used on.
        alpha: how many times fewer keys and values a decode step is to read; with a table, how many
            times as fast it is to be.
        window: what a head sees that gets one.
        recipe: see `WindowRecipe`.
        backend: inner torch.compile backend; ``"eager"`` needs no compilation.
        say: called with a line of text at each stage.

    Raises:
        ValueError: no texts, none that is longer than the window, or an alpha that windows do not
            give.
        UnsupportedError, TableError: the model cannot be captured; the table is not for it.
    """
    recipe = recipe or WindowRecipe()
    if recipe.table is not None:
        recipe.table.check(model)
    groups = tokenized(model, tokenizer, texts, recipe.max_length, least=1).values()
    samples = [ids for group in groups for ids in group]
    longest = max(ids.shape[1] for ids in samples)
    if window.seen(longest) == longest:
        raise ValueError(
            f"a {window} sees all of the longest text, which has {longest} tokens: give longer "
            "texts, a larger max_length, or a smaller window"
        )
    compiled = build(model, None, backend=backend)
    say("questions")
    loss = _loss(compiled, tokenizer, samples, recipe)
    policy = Windowed(
        loss,
        loss.kv_heads,
        window,
        recipe.context or recipe.max_length,
        recipe.per,
        recipe.shortlist,
        table=recipe.table,
        phase=recipe.phase,
    )
    say("search")
    plan = policy.search(compiled.adaskip.sublayers, alpha, recipe.start)
    kl = f"{loss.text_loss(plan):.4f}, of answers {loss.answer_loss(plan):.4f} nats a token"
    say(f"{loss.judged} plans judged; KL of texts {kl}")
    return plan.with_fingerprint(fingerprint(model))


def _loss(
    compiled: Any, tokenizer: Tokenizer, samples: Sequence[torch.Tensor], recipe: WindowRecipe
) -> CalibrationLoss:
    longest = max(ids.shape[1] for ids in samples)
    asked = tokenizer, samples, recipe.questions, longest, recipe.seed
    return CalibrationLoss(
        compiled,
        samples,
        answerable_questions(compiled, *asked),
        text_weight=recipe.text_weight,
        answer_divergence=True,
        memory=free_memory(samples[0].device),
    )


def answerable_questions(
    compiled: Any,
    tokenizer: Tokenizer,
    texts: Sequence[torch.Tensor],
    count: int,
    tokens: int,
    seed: int,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return prompts that ask for what is hidden in texts, and answers, int64 [1, tokens] each.

    Four times as many are drawn, and those are taken whose answers the full model finds likeliest.

    Args:
        compiled: a compiled model.
        tokenizer: the model's.
        texts: token ids [1, T] to hide things in.
        count: how many.
        tokens: of a prompt and its answer together.
        seed: of the random choices.
    """
    drawn = retrieval_samples(tokenizer, texts, _DRAWN * count, tokens, max_facts=1, seed=seed)
    pairs = []
    for sample in drawn:
        start = answer_start(sample)
        pairs.append((sample.ids[:, :start], sample.ids[:, start:]))
    if not pairs:
        return []
    empty = SkipPlan.empty(compiled.adaskip.sublayers)
    losses = [CalibrationLoss(compiled, (), [pair])(empty) for pair in pairs]
    best = sorted(range(len(pairs)), key=losses.__getitem__)[:count]
    return [pairs[number] for number in sorted(best)]


def free_memory(device: torch.device) -> int:
    """Return how many bytes predictions may take; on a GPU a quarter of what is free."""
    if device.type != "cuda":
        return 2**31
    return torch.cuda.mem_get_info(device)[0] // 4
