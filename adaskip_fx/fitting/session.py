"""What the steps of a recipe share: one compiled model, and texts for training and validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from adaskip_fx.calibration.calibrate import tokenize
from adaskip_fx.calibration.loss import CalibrationLoss
from adaskip_fx.calibration.tokenizer import Tokenizer
from adaskip_fx.parallel.replicas import DataParallel
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.policies import Greedy
from adaskip_fx.profiles.profile import Profile

from .augmentation import pack, vary_layouts
from .distillation import DistillConfig, allow_tf32, distill
from .fitter import Fitter
from .retrieval_prompts import retrieval_samples
from .search_fits import SurrogateFitter
from .spec import SurrogateSpec
from .synthetic_text import write_texts
from .weighted_sample import Sample

#: texts, or token ids int64 [1, T], of several kinds by name
Kinds = Mapping[str, Sequence[str | torch.Tensor]]
Tokens = dict[str, list[torch.Tensor]]
Say = Callable[[str], None]

SYNTHETIC_KINDS = ("synthetic", "synthetic, interleaved")
_DOCUMENT_TOKENS = 640  # that a model writes in one go: small ones lose the thread
_GROUP_SIZE = 64  # sublayers whose moments are taken in one pass
_ROWS, _CPU_ROWS = 512, 16  # documents that are written at once
_SEARCH_TEXTS = 2  # of each kind, that a search fits on
_FIT_TEXTS = 24  # of each kind, for a closed form: more would change it little
_LOSS_TEXTS = 1  # of each kind, that a search judges by
_LOSS_TOKENS = 2048  # of each of them at most
_LOSS_ANSWERS = 2  # that a search judges by
_ANSWER_WEIGHT = 0.1  # against that of texts
_SYNTHETIC_TURNS = 3  # of each synthetic kind in a distillation, for one of all other texts
_MAX_EXTRA_LOSS = math.log(1.04)  # nats a token that all decode extras together may cost


class FittingSession:
    """Texts and a compiled model, for plans of one model.

    Args:
        model: a transformers decoder in evaluation mode; it is not changed.
        tokenizer: the model's.
        texts: by kind; of each every fifth, and at least one of two, is held out for validation.
        synthetic_samples: samples that the model writes itself.
        max_length: tokens of a sample at most.
        seed: of all random choices.
        backend: inner torch.compile backend.
        say: called with a line of text at each stage.
        data_parallel: share the texts of moments among processes, as for
            :func:`adaskip_fx.calibrate`; each does all else by itself.

    Attributes:
        train: token ids int64 [1, T], by kind, to fit on.
        validation: token ids int64 [1, T], by kind, to judge by.
        fitter: on all of `train`.
        loss: judges plans on `validation`.

    Raises:
        ValueError: no texts, or a kind with one text only.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        texts: Kinds,
        *,
        synthetic_samples: int = 0,
        max_length: int = 2048,
        seed: int = 0,
        backend: str = "eager",
        say: Say = lambda _: None,
        data_parallel: DataParallel = False,
    ) -> None:
        self.tokenizer, self.max_length, self.seed, self.say = tokenizer, max_length, seed, say
        tokens = tokenized(model, tokenizer, texts, max_length)
        first = {kind: samples[:1] for kind, samples in tokens.items()}
        options: dict[str, Any] = {"backend": backend, "data_parallel": data_parallel}
        fitter = Fitter(
            model, tokenizer, first, max_length=max_length, group_size=_GROUP_SIZE, **options
        )
        if synthetic_samples:
            tokens |= self._write(fitter, synthetic_samples)
        self.train, self.validation = _split(tokens)
        self.fitter = fitter.with_texts(self.train)
        self.loss = self._validation_loss()

    def search(
        self, profile: Profile, alpha: float, spec: SurrogateSpec, shortlist: int | None = None
    ) -> tuple[SkipPlan, ...]:
        """Return the plans of a greedy search, from none skipped to as many as `alpha` says.

        Args:
            profile: of the model.
            alpha: acceleration ratio.
            spec: what kind of surrogate each candidate gets.
            shortlist: sublayers to try at each step, the most similar; None for all.
        """
        self.say("search")
        fits = SurrogateFitter(self._fitter_on(_SEARCH_TEXTS), spec)
        never = frozenset(self.fitter.runtime.graphs.structure.unskippable)
        greedy = Greedy(self.loss, fits, never=never, shortlist=shortlist)
        with allow_tf32():
            return greedy.plans(profile, alpha)

    def fit(self, plan: SkipPlan, spec: SurrogateSpec, in_order: bool = True) -> SkipPlan:
        """Return the plan with surrogates.

        Args:
            plan: what is skipped.
            spec: what kind of surrogate to fit.
            in_order: whether to fit them in the order of the plan; otherwise each is fitted as if
                its sublayer alone were skipped.
        """
        fitter = self._fitter_on(_FIT_TEXTS)
        self.say(f"fit {len(plan.prefill)} surrogates on {fitter.tokens:,} tokens")
        bare = plan.with_surrogates(Surrogates())
        return fitter.fit(bare, spec) if in_order else fitter.fit_independently(bare, spec)

    def distill(self, plan: SkipPlan, steps: int) -> SkipPlan:
        """Return the plan after so many steps of distillation.

        Steps take from texts of all kinds, and from prompts that hide something.
        """
        texts = [t for kind, ids in self.train.items() if kind not in SYNTHETIC_KINDS for t in ids]
        synthetic = [self.train[kind] for kind in SYNTHETIC_KINDS if kind in self.train]
        count = max(8, len(self.fitter.samples) // 2)
        retrieval = self._retrieval(self.train, count, self.seed + 2)
        validation = [Sample(t) for ids in self.validation.values() for t in ids[:2]]
        validation += self._retrieval(self.validation, 2, self.seed + 3)
        groups = [[Sample(t) for t in texts], retrieval]
        groups += [[Sample(t) for t in ids] for ids in synthetic] * _SYNTHETIC_TURNS
        config = DistillConfig(steps=steps, eval_interval=max(1, steps // 10), seed=self.seed)
        plan, log = distill(self._fitter_on(_FIT_TEXTS), plan, groups, validation, config)
        self.say(
            f"distilled: KL of validation samples from {log.losses[0]:.4f} to "
            f"{min(log.losses.values()):.4f} nats a token, at step {log.best_step} of {steps}"
        )
        return plan

    def add_extras(self, plan: SkipPlan, spec: SurrogateSpec) -> SkipPlan:
        """Return the plan with surrogates for the ffn sublayers that decoding may add.

        They are taken from the one that costs the least on, as long as all together cost at most 4%
        of perplexity.
        """
        surrogates = self._fitter_on(_SEARCH_TEXTS).fit_running(plan, spec)
        most = self.loss.text_loss(plan) + _MAX_EXTRA_LOSS
        alone = {
            s: self.loss.text_loss(_with_skipped(plan, surrogates, [s]))
            for s in surrogates.by_sublayer
        }
        extras: list[Sublayer] = []
        for sublayer in sorted(alone, key=lambda s: (alone[s], s)):
            if self.loss.text_loss(_with_skipped(plan, surrogates, [*extras, sublayer])) > most:
                break
            extras.append(sublayer)
        self.say(f"decoding may add {len(extras)} ffn sublayers")
        chosen = Surrogates({s: surrogates.by_sublayer[s] for s in extras})
        return plan.with_surrogates(plan.surrogates.merged(chosen))

    def _fitter_on(self, most: int) -> Fitter:
        """Return a fitter on at most so many texts of each kind."""
        return self.fitter.with_texts({kind: ids[:most] for kind, ids in self.train.items()})

    def _write(self, fitter: Fitter, count: int) -> Tokens:
        """Return samples of texts that the model writes: half in a row, half interleaved."""
        self.say(f"write {count} samples of {self.max_length:,} tokens")
        runtime = fitter.runtime
        length = min(_DOCUMENT_TOKENS, self.max_length)
        documents = -(-count * self.max_length // length) + 2
        rows = _ROWS if runtime.device.type == "cuda" else _CPU_ROWS
        texts = write_texts(
            runtime, self.tokenizer, documents, length, batch_size=rows, seed=self.seed
        )
        texts = vary_layouts(texts, self.tokenizer, self.seed)
        half = len(texts) // 2
        packed = (
            pack(texts[:half], self.max_length),
            pack(texts[half:], self.max_length, interleaved=True, seed=self.seed),
        )
        by_kind = zip(SYNTHETIC_KINDS, packed, strict=True)
        return {kind: samples for kind, samples in by_kind if len(samples) > 1}

    def _retrieval(
        self, texts: Tokens, count: int, seed: int, max_facts: int = 4, limit: int | None = None
    ) -> list[Sample]:
        """Return prompts of at most `limit` tokens that hide facts in texts and ask for them."""
        sources = [t for ids in texts.values() for t in ids]
        longest = max(t.shape[1] for t in sources)
        tokens = min(limit or self.max_length, self.max_length, longest)
        return retrieval_samples(
            self.tokenizer, sources, count, tokens, max_facts=max_facts, seed=seed
        )

    def _validation_loss(self) -> CalibrationLoss:
        """Return the loss on validation texts, and on answers to prompts made of them."""
        texts = [t[:, :_LOSS_TOKENS] for ids in self.validation.values() for t in ids[:_LOSS_TEXTS]]
        samples = self._retrieval(
            self.validation, _LOSS_ANSWERS, self.seed + 1, max_facts=1, limit=_LOSS_TOKENS
        )
        starts = [answer_start(sample) for sample in samples]
        answers = [(s.ids[:, :at], s.ids[:, at:]) for s, at in zip(samples, starts, strict=True)]
        return CalibrationLoss(
            self.fitter.runtime.model, texts, answers, answer_weight=_ANSWER_WEIGHT
        )


def tokenized(
    model: Any, tokenizer: Tokenizer, texts: Kinds, max_length: int, least: int = 2
) -> Tokens:
    """Return token ids int64 [1, T] on the model's device, by kind.

    Raises:
        ValueError: no texts, or fewer than `least` of a kind.
    """

    def ids(text: str | torch.Tensor) -> torch.Tensor:
        if isinstance(text, str):
            text = tokenize(model, tokenizer, [text], max_length)[0]
        return text[:, :max_length].to(model.device)

    tokens = {kind: [ids(text) for text in group] for kind, group in texts.items()}
    if not tokens or any(len(group) < least for group in tokens.values()):
        held_out = "two texts of each kind: one is held out for validation"
        raise ValueError(f"give at least {held_out if least > 1 else 'one text of each kind'}")
    return tokens


def _split(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """Return texts for training and for validation: the last of each five, or of fewer."""
    train, validation = {}, {}
    for kind, ids in tokens.items():
        held_out = range(4, len(ids), 5) if len(ids) > 4 else range(len(ids) - 1, len(ids))
        train[kind] = [t for i, t in enumerate(ids) if i not in held_out]
        validation[kind] = [ids[i] for i in held_out]
    return train, validation


def answer_start(sample: Sample) -> int:
    """Return where the answer of a sample that asks once begins."""
    shares = sample.shares
    return int((shares > 1.5 * shares.min()).nonzero()[0]) + 1


def _with_skipped(plan: SkipPlan, surrogates: Surrogates, more: Sequence[Sublayer]) -> SkipPlan:
    """Return the plan with more sublayers skipped, in prefill as well, where they can be judged."""
    added = Surrogates({s: surrogates.by_sublayer[s] for s in more})
    skip = (*plan.prefill, *more)
    surrogates = plan.surrogates.merged(added)
    return SkipPlan.of(plan.sublayers, skip, surrogates=surrogates, windows=plan.windows)
