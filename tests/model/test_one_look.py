"""The host waits for a device once in a round of drafts, whoever drafts and whatever it costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from adaskip_fx.model.blocks import BlockRequest
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.speculation.options import Bounded
from adaskip_fx.speculation.skipped import Skipped
from adaskip_fx.speculation.speculation import Speculation
from tests.support.drafts import Drafting, Oracle, drafting

#: What the host learns a tensor's values with.
READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


@contextmanager
def counted(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yield what was read with meanwhile."""
    seen = list[str]()

    def counts(name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(read)
        def call(*args: Any) -> Any:
            seen.append(name)
            return read(*args)

        return call

    with patch.context() as meanwhile:
        for name in READS:
            meanwhile.setattr(torch.Tensor, name, counts(name, getattr(torch.Tensor, name)))
        yield seen


def looks(patch: pytest.MonkeyPatch, kind: str) -> float:
    """How often the host looks in a round, beyond what a request costs that has fewer rounds."""
    model, rows = drafting(), 2
    ids, mask = model.tokens(rows, 9), torch.ones(rows, 9, dtype=torch.int64)
    mask[1, :2] = 0
    found = list[tuple[int, int]]()
    for new in (9, 9, 30):  # the first one captures
        options = {"max_new_tokens": new, "do_sample": kind == "sampled", "pad_token_id": 0}
        options |= {"attention_mask": mask, "eos_token_id": 10**6}
        stats = begin(model, kind, ids, options).stats
        with counted(patch) as seen:
            model.fast.generate(ids, **options)
        found.append((len(seen), stats.verifications + stats.steps))
    (_, (reads, rounds), (more_reads, more_rounds)) = found
    assert more_rounds > rounds + 3
    return (more_reads - reads) / (more_rounds - rounds)


def begin(model: Drafting, kind: str, ids: torch.Tensor, options: dict[str, Any]) -> Speculation:
    plan = SkipPlan.of(model.runtime.sublayers, ["1.ffn"])
    if kind == "bounded":
        decoding = Bounded((Skipped(plan),), 3, adaptive=False, max_divergence=0.3)
        model.runtime.speculation = Speculation(decoding, plan)
        return model.runtime.speculation
    if kind == "sampled":
        return model.begin(Skipped(plan), longest=3)
    return model.begin(Oracle(model.model.generate(ids, **options), wrong=5), longest=3)


@pytest.mark.parametrize("kind", ["greedy", "sampled", "bounded"])
def test_a_round_has_one_look(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks(monkeypatch, kind) < 1.3, "a plain step at the end reads its token as well"


@pytest.mark.breaks
def test_two_looks_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: what stands is asked for before what follows."""
    look = BlockRequest._look

    def looks_twice(self: Any, flags: torch.Tensor, *rest: torch.Tensor) -> Any:
        flags.tolist()
        return look(self, flags, *rest)

    monkeypatch.setattr(BlockRequest, "_look", looks_twice)
    assert looks(monkeypatch, "sampled") > 1.5
