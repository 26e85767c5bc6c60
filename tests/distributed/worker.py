"""One of the processes of `processes.run`: runs checks in order and writes what it found.

A check is a function of this file, or of `failures`; it gets what the checks share and returns what
JSON can hold. Every rank runs the same ones.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.distributed import DistributedConfig

import adaskip_fx
from adaskip_fx import AdaSkip, Profile, SkipPlan
from adaskip_fx.api import build
from adaskip_fx.capture import phase_graph
from adaskip_fx.plans.decisions import Schedule
from adaskip_fx.plans.windows import Window, Windows
from adaskip_fx.profiles.fingerprint import fingerprint
from adaskip_passes.decode.fuse_attention import FuseAttention
from adaskip_passes.decode.fuse_experts import FuseExperts
from adaskip_passes.decode.fuse_projections import FuseProjections
from adaskip_passes.decode.fuse_rank_sums import FuseRankSums
from adaskip_passes.decode.fuse_rotary import FuseRotary
from tests.distributed import caches, drafts, failures, families, fits, replicas
from tests.support.compiled_llamas import follow
from tests.support.eager_reference import Oracle, moments, plain_streams, relative_error
from tests.support.eager_windows import WindowedEager

torch.set_num_threads(1)
_SIZES = {
    "vocab_size": 98,  # older transformers shards no odd number
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GREEDY = {"do_sample": False, "pad_token_id": 0}


class Eager(AdaSkip):
    """AdaSkip that adds FFN sublayers of models whose weights are random."""

    def threshold(self, profile: Profile, plan: SkipPlan) -> float | None:
        beta = super().threshold(profile, plan)
        return None if beta is None else beta - 0.25


class Tokenizer:
    """Ids drawn by the length of the text."""

    name_or_path = "drawn"

    def __call__(self, text: str, **_options: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": tokens(1, 24, len(text))}


def tokens(rows: int, count: int, seed: int) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(1, _SIZES["vocab_size"], (rows, count), generator=drawn)


class Calls(TorchDispatchMode):
    """Counts sums over ranks, and operators of our own, while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = self.own = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.sums += any(name in str(func) for name in ("all_reduce", "sum_over_ranks"))
        self.own += str(func).startswith("adaskip.")
        return func(*args, **(kwargs or {}))


def shards_embeddings(model: Any) -> bool:
    """Whether there is a sum of embeddings as well: there is none in transformers 5.17."""
    return hasattr(model.get_input_embeddings().weight, "device_mesh")


class Shared:
    """What the checks share: models, made when they are asked for first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rank = int(os.environ["RANK"])
        (folder / f"process-{self.rank}").write_text(str(os.getpid()))

    def pair(self, kind: Any, config: Any, **spread_by: int) -> tuple[Any, Any]:
        """A model in one process, and the same on all ranks."""
        saved = self.folder / config.model_type
        if self.rank == 0:
            torch.manual_seed(0)
            made = kind.from_config if hasattr(kind, "from_config") else kind
            made(config).save_pretrained(saved)
        dist.barrier()
        alone = kind.from_pretrained(saved).eval()
        how = DistributedConfig(tp_size=2, **spread_by)
        spread = kind.from_pretrained(saved, distributed_config=how)
        return alone, spread.eval()

    @functools.cached_property
    def llamas(self) -> tuple[Any, Any]:
        return self.pair(LlamaForCausalLM, LlamaConfig(**_SIZES))

    @functools.cached_property
    def fast(self) -> Any:
        """The model on all ranks, compiled without anything skipped."""
        return build(self.llamas[1], None, backend="eager")

    @functools.cached_property
    def oracle(self) -> Oracle:
        return Oracle(self.llamas[0])

    @functools.cached_property
    def profile(self) -> Profile:
        """Measured on all ranks."""
        return adaskip_fx.calibrate(self.llamas[1], Tokenizer(), ["a", "bb"], max_length=64)


def last(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    """The logits of the last token, [B, 1, V]: prompts that ask for them have a graph by now."""
    logits: torch.Tensor = model(ids, logits_to_keep=1, **more).logits
    return logits


def by_hand(model: Any, ids: torch.Tensor) -> list[list[float]]:
    """The statistics of each sublayer for one text, [sublayers, 5]."""
    return [moments(*stream)[0].tolist() for stream in plain_streams(model, ids).values()]


def said(work: Callable[[], Any]) -> str:
    """The class and text of what is raised."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


# What a model on several ranks gives -----------------------------------------------------------


def forward(shared: Shared) -> Any:
    alone, spread = shared.llamas
    ids = tokens(2, 11, 1)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        expected, theirs, ours = (last(m, ids) for m in (alone, spread, shared.fast))
        padded, ours_padded = (last(m, ids, attention_mask=mask) for m in (alone, shared.fast))
    return {
        "transformers": relative_error(theirs, expected),
        "ours": relative_error(ours, expected),
        "ours beside theirs": relative_error(ours, theirs),
        "padded": relative_error(ours_padded, padded),
        "why traced": shared.fast._adaskip.graphs.why_traced,
        "contiguous": all(p.is_contiguous() for p in shared.fast.parameters()),
        "tensors": sorted({type(p).__name__ for p in shared.fast.model.layers.parameters()}),
    }


def replaced(shared: Shared) -> Any:
    """Another tensor in place of a sharded one, in the original alone, and back."""
    ids, layer = tokens(2, 11, 1), shared.llamas[1].model.layers[1].mlp.down_proj
    before = layer.weight
    with torch.no_grad():
        first = last(shared.fast, ids)
        layer.weight = torch.nn.Parameter(before * 2)
        ours, theirs = last(shared.fast, ids), last(shared.llamas[1], ids)
        layer.weight = before
        again = last(shared.fast, ids)
    return {
        "error": relative_error(ours, theirs),
        "changed": relative_error(ours, first),
        "back": relative_error(again, first),
    }


def generate(shared: Shared) -> Any:
    ids = tokens(2, 7, 2)
    cache = shared.fast.adaskip.new_cache()
    more = {"max_new_tokens": 8, **_GREEDY}
    made = shared.fast.generate(ids, past_key_values=cache, **more)
    expected = shared.llamas[0].generate(ids, **more)
    heads = {k.shape[1] for k in cache.keys if k is not None}
    return {"equal": made.tolist() == expected.tolist(), "heads": sorted(heads)}


def further(shared: Shared) -> Any:
    """All logits of a prompt, and a second turn on one cache."""
    ids = tokens(2, 11, 1)
    more = {"max_new_tokens": 8, **_GREEDY}
    cache = shared.fast.adaskip.new_cache()
    with torch.no_grad():
        whole = relative_error(shared.fast(ids).logits, shared.llamas[0](ids).logits)
    made = shared.fast.generate(ids, past_key_values=cache, **more)
    again = torch.cat([made, tokens(2, 3, 3)], 1)
    turn = shared.fast.generate(again, past_key_values=cache, **more)
    expected = shared.llamas[0].generate(again, **more)
    shared.fast._adaskip.static_cache = True
    static = shared.fast.generate(ids, **more)
    shared.fast._adaskip.static_cache = False
    return {
        "whole": whole,
        "second turn": turn.tolist() == expected.tolist(),
        "static cache": static.tolist() == made.tolist(),
        "why no static cache": shared.fast._adaskip.why_no_static_cache,
    }


def skipping(shared: Shared) -> Any:
    """Prompts, decode steps and an extension under plans, and the collectives of each."""
    fast, sublayers = shared.fast, shared.fast.adaskip.sublayers
    found: dict[str, Any] = {}
    for skip, extra in (([], []), (["1.attention"], ["2.ffn"]), (["0.attention", "3.ffn"], [])):
        plan = SkipPlan.of(sublayers, skip, decode_extra=extra)
        follow(shared.oracle, plan)
        steps = [tokens(2, count, number) for number, count in enumerate((9, 1, 1, 3))]
        first = fast.adaskip.new_cache(plan=plan)
        for ids in steps:  # captures and links
            last(fast, ids, past_key_values=first)
        cache, reference = fast.adaskip.new_cache(plan=plan), DynamicCache()
        errors, sums = [], []
        for ids in steps:
            with Calls() as counted:
                logits = last(fast, ids, past_key_values=cache)
            errors.append(relative_error(logits, shared.oracle.step(ids, reference)[:, -1:]))
            sums.append(counted.sums - shards_embeddings(shared.llamas[1]))
        stored = [layer for layer, keys in enumerate(cache.keys) if keys is not None]
        name = " ".join([*skip, *(f"{s} in decode" for s in extra)]) or "nothing"
        found[name] = {"errors": errors, "sums": sums, "stored": stored}
    return found


def head_windows(shared: Shared) -> Any:
    """Windows that leave K/V heads full, which are on one rank each; and on the other one."""
    fast, reference = shared.fast, WindowedEager(shared.llamas[0])
    ids, prompt = tokens(2, 12, 6), 9
    found: dict[str, Any] = {"heads": sorted(set(fast.adaskip.kv_heads.values()))}
    for name, full in (("as asked", 1), ("on the other", 0)):
        windows = {"1.attention": Window(3, 1, (full,)), "2.attention": Window(2, 0, (0,))}
        plan = SkipPlan.of(fast.adaskip.sublayers, [], windows=Windows.of(windows))
        cache = fast.adaskip.new_cache(plan=plan)
        steps = [ids[:, :prompt], *ids[:, prompt:].split(1, 1)]
        got = torch.cat([last(fast, step, past_key_values=cache) for step in steps], 1)
        seen = {1: (1, 3, (1,)), 2: (0, 2, (0,))}
        expected = reference.logits(ids, (0, 0), [seen] * 12)
        found[name] = relative_error(got, expected[:, prompt - 1 :])
    over = SkipPlan.of(
        fast.adaskip.sublayers, [], windows=Windows.of({"1.attention": Window(3, 0, (2,))})
    )
    found["over"] = said(lambda: fast.adaskip.new_cache(plan=over))
    return found


def plan_changes(shared: Shared) -> Any:
    """A schedule that changes its plan in mid-request, and a plan put on while decoding."""
    fast, sublayers = shared.fast, shared.fast.adaskip.sublayers
    first = SkipPlan.of(sublayers, ["1.attention"])
    later = SkipPlan.of(sublayers, ["1.attention"], decode_extra=["0.ffn", "2.ffn"])
    cache = fast.adaskip.new_cache(plan=Schedule(((0, first), (2, later))))
    reference, errors = DynamicCache(), []
    for number, count in enumerate((6, 1, 1, 1, 1)):
        follow(shared.oracle, first if number < 3 else later)
        ids = tokens(2, count, number)
        logits = last(fast, ids, past_key_values=cache)
        errors.append(relative_error(logits, shared.oracle.step(ids, reference)[:, -1:]))
    others = (["3.ffn"], ["2.ffn"])
    other = SkipPlan.of(sublayers, ["1.attention"], decode_extra=others[shared.rank])
    cache.request.decode_with(other)
    text = said(lambda: last(fast, tokens(2, 1, 9), past_key_values=cache))
    return {"errors": errors, "other plans": text}


def memory_budget(shared: Shared) -> Any:
    """Plans in turn with little room; on one rank requests end later than on the other."""
    fast, sublayers = shared.fast, shared.fast.adaskip.sublayers
    before, held, errors = fast.adaskip.memory_budget, [], []

    def set_other() -> None:
        fast.adaskip.memory_budget = before + shared.rank

    other = said(set_other)
    for number, skip in enumerate(("1.ffn", "2.ffn", "3.ffn", "1.ffn", "2.ffn")):
        plan = SkipPlan.of(sublayers, [skip])
        follow(shared.oracle, plan)
        cache, reference = fast.adaskip.new_cache(plan=plan), DynamicCache()
        for ids in (tokens(2, 9, number), tokens(2, 1, number)):
            logits = last(fast, ids, past_key_values=cache)
            errors.append(relative_error(logits, shared.oracle.step(ids, reference)[:, -1:]))
        held += [cache] if shared.rank else []
        if number == 1:
            stats = fast.adaskip.stats()
            fast.adaskip.memory_budget = stats.graph_bytes + stats.program_bytes // 2
    now = fast.adaskip.stats()
    fast.adaskip.memory_budget = before
    kept = now.graphs, now.programs, now.dropped, now.captures
    return {"errors": errors, "other": other, "kept": kept}


def calibrated(shared: Shared) -> Any:
    """What a profile of all ranks says, beside sums in float64 of what one process computes."""
    sums = [by_hand(shared.llamas[0], Tokenizer()(t)["input_ids"]) for t in ("a", "bb")]
    return {
        "statistics": shared.profile.statistics.tolist(),
        "by hand": sums,
        "fingerprint": shared.profile.fingerprint == fingerprint(shared.llamas[0]),
    }


def profiles(shared: Shared) -> Any:
    """A profile measured on all ranks, and on one; each used on the other."""
    profile, alone = shared.profile, None
    more = {"max_new_tokens": 12, **_GREEDY}
    ids = tokens(1, 9, 4)
    policy = Eager(window=4)
    fast = adaskip_fx.compile(shared.llamas[1], profile, 1.3, policy=policy, backend="eager")
    cache = fast.adaskip.new_cache()
    made = fast.generate(ids, past_key_values=cache, **more)
    decode = sorted(map(str, cache.request.decode_plan.skipped("decode")))
    found: dict[str, Any] = {
        "statistics": profile.statistics.tolist(),
        "digest": profile.digest,
        "fingerprint": str(profile.fingerprint),
        "weights": profile.fingerprint.weights,
        "tokens": made.tolist(),
        "decode": decode,
        "prefill": sorted(map(str, fast.adaskip.plan.skipped("prefill"))),
    }
    if shared.rank == 0:  # in one process
        alone = adaskip_fx.calibrate(shared.llamas[0], Tokenizer(), ["a", "bb"], max_length=64)
        model = adaskip_fx.compile(shared.llamas[0], profile, 1.3, policy=policy, backend="eager")
        cache = model.adaskip.new_cache()
        found["alone"] = {
            "statistics": alone.statistics.tolist(),
            "fingerprint": str(alone.fingerprint),
            "weights": alone.fingerprint.weights,
            "tokens": model.generate(ids, past_key_values=cache, **more).tolist(),
            "decode": sorted(map(str, cache.request.decode_plan.skipped("decode"))),
        }
        alone.save(shared.folder / "alone")
    dist.barrier()
    theirs = Profile.load(shared.folder / "alone")
    of_one = adaskip_fx.compile(shared.llamas[1], theirs, 1.3, policy=policy, backend="eager")
    found["by the profile of one"] = of_one.generate(ids, **more).tolist()
    return found


def sampled(shared: Shared) -> Any:
    """Tokens drawn by ranks whose seeds differ."""
    torch.manual_seed(100 + shared.rank)
    ids = tokens(2, 7, 2)
    drawn = shared.fast.generate(ids, do_sample=True, max_new_tokens=8, pad_token_id=0)
    after = torch.rand(1).item()
    torch.manual_seed(100)
    alone = shared.llamas[0].generate(ids, do_sample=True, max_new_tokens=8, pad_token_id=0)
    return {"drawn": drawn.tolist(), "alone": alone.tolist(), "after": after}


def clocks(shared: Shared) -> Any:
    """How many tokens there are where time is over on one rank: on the first, on the other."""
    counts, ids = dict[str, int](), tokens(2, 7, 2)
    for name, seconds in (("first", (0.0, 1e6)), ("other", (1e6, 0.0))):
        made = shared.fast.generate(ids, max_new_tokens=4, max_time=seconds[shared.rank], **_GREEDY)
        counts[name] = made.shape[1] - ids.shape[1]
    return counts


class Longest(StoppingCriteria):  # type: ignore[misc]
    """A criterion of a user's own, which ends a text at other lengths on other ranks."""

    def __init__(self, longest: int) -> None:
        self.longest, self.asked = longest, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        self.asked += 1
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= self.longest)


def criteria(shared: Shared) -> Any:
    """How many tokens there are by criteria that differ: shorter on the first rank, or longer."""
    counts, ids = dict[str, Any](), tokens(2, 7, 2)
    for name, longest in (("first", (9, 12)), ("other", (12, 9))):
        mine = Longest(longest[shared.rank])
        made = shared.fast.generate(
            ids, max_new_tokens=8, stopping_criteria=StoppingCriteriaList([mine]), **_GREEDY
        )
        counts[name] = made.shape[1], mine.asked
    return counts


def disagreements(shared: Shared) -> Any:
    """What ranks are told that are given other plans, alphas, prompts, calls or texts."""
    fast, sublayers, rank = shared.fast, shared.fast.adaskip.sublayers, shared.rank
    plan = SkipPlan.of(sublayers, [f"{rank}.attention"])

    def set_plan() -> None:
        fast.adaskip.plan = plan

    def compile_other(alpha: float) -> None:
        adaskip_fx.compile(shared.llamas[1], shared.profile, alpha, backend="eager")

    def other_calls() -> None:
        set_plan() if rank else last(fast, tokens(1, 5, 0))

    def one_fails() -> None:
        adaskip_fx.compile(shared.llamas[1], shared.profile, 1.3 if rank else 0.5, backend="eager")

    return {
        "plan": said(set_plan),
        "plan of a request": said(lambda: fast.adaskip.new_cache(plan=plan)),
        "alpha": said(lambda: compile_other(1.3 + rank / 10)),
        "prompt": said(lambda: last(fast, tokens(1, 5 + rank, 0))),
        "tokens": said(lambda: last(fast, tokens(1, 5, rank))),
        "calls": said(other_calls),
        "one fails": said(one_fails),
        "plan still": fast.adaskip.plan.digest == SkipPlan.empty(sublayers).digest,
        "goes on": said(lambda: last(fast, tokens(1, 5, 0))),
    }


def refused(shared: Shared) -> Any:
    """What a model on several ranks cannot do."""
    fast, spread = shared.fast, shared.llamas[1]
    sublayers = fast.adaskip.sublayers
    window = Windows.of({"1.attention": Window(8, full_heads=(0,))})
    by_head = SkipPlan.of(sublayers, [], windows=window)
    structure = fast._adaskip.graphs.structure
    known, structure._shares = structure._shares, {}  # as of a layer whose projections are fused
    of_fused = said(lambda: fast.adaskip.new_cache(plan=by_head))
    structure._shares = known
    spread.config.distributed_config.pp_size = 2
    piped = said(lambda: build(spread, None, backend="eager"))
    spread.config.distributed_config.pp_size = None
    return {
        "by head": of_fused,
        "clock": said(
            lambda: fast.generate(tokens(1, 5, 0), max_time=1.0, num_beams=2, pad_token_id=0)
        ),
        "calibrated windows": said(
            lambda: adaskip_fx.calibrate(spread, Tokenizer(), ["a"], 64, windows=[Window(8)])
        ),
        "pipeline": piped,
    }


def experts(shared: Shared) -> Any:
    """A mixture of experts, with and without something skipped."""
    sizes = {**_SIZES, "num_hidden_layers": 1, "num_local_experts": 4}
    config = transformers.MixtralConfig(**sizes, num_experts_per_tok=2)
    alone, spread = shared.pair(transformers.MixtralForCausalLM, config)
    fast = build(spread, None, backend="eager")
    ids = tokens(2, 9, 5)
    plan = SkipPlan.of(fast.adaskip.sublayers, ["0.ffn"])
    with torch.no_grad():
        whole = relative_error(last(fast, ids), last(alone, ids))
        alone.model.layers[0].mlp.forward = torch.zeros_like  # its branch adds nothing
        cache = fast.adaskip.new_cache(plan=plan)
        skipped = relative_error(last(fast, ids, past_key_values=cache), last(alone, ids))
    return {
        "whole": whole,
        "skipped": skipped,
        "fingerprint": fingerprint(alone) == fingerprint(spread),
    }


def whole_experts(shared: Shared) -> Any:
    """A mixture whose experts are whole, two on each rank, and what is refused of such ones."""
    config = transformers.MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2)
    alone, spread = shared.pair(transformers.MixtralForCausalLM, config, ep_size=2)
    fast = build(spread, None, backend="eager")
    ids = tokens(2, 9, 5)
    with torch.no_grad():
        whole = relative_error(last(fast, ids), last(alone, ids))
        with Calls() as counted:
            last(fast, ids)
        alone.model.layers[1].mlp.forward = torch.zeros_like  # its branch adds nothing
        plan = SkipPlan.of(fast.adaskip.sublayers, ["1.ffn"])
        cache = fast.adaskip.new_cache(plan=plan)
        skipped = relative_error(last(fast, ids, past_key_values=cache), last(alone, ids))
    experts = spread.model.layers[0].mlp.experts
    implementations = importlib.import_module("transformers.distributed.expert_parallel")
    del experts.forward
    held = implementations.EpDispatchExpertsParallel()
    mesh = spread._device_mesh["tp"]
    held.install_forward(experts, mesh, tp_mesh=mesh, ep_implementation="all_to_all")
    return {
        "whole": whole,
        "skipped": skipped,
        "sums": counted.sums - shards_embeddings(spread),
        "experts": experts.gate_up_proj.to_local().shape[0],
        "why traced": list(fast._adaskip.graphs.why_traced),
        "fingerprint": fingerprint(alone) == fingerprint(spread),
        "exchanged": said(lambda: build(spread, None, backend="eager")),
    }


def backend(shared: Shared) -> Any:
    """The same plan by way of torch.compile, on a static cache of the user's."""
    alone, spread = shared.llamas
    plan = SkipPlan.of(shared.fast.adaskip.sublayers, ["1.attention"], decode_extra=["2.ffn"])
    follow(shared.oracle, plan)
    options = {"plan": plan, "inner_backend": "eager"}
    compiled = torch.compile(spread, backend="adaskip", options=options, dynamic=False)
    cache, reference, errors = StaticCache(alone.config, max_cache_len=32), DynamicCache(), []
    for past, count in ((0, 8), (8, 1), (9, 1)):
        ids = tokens(2, count, past)
        order = torch.arange(past, past + count).expand(2, -1)
        with torch.no_grad():
            given = {"past_key_values": cache, "use_cache": True, "position_ids": order}
            logits = compiled(ids, **given).logits
        errors.append(relative_error(logits, shared.oracle.step(ids, reference)))
    return {"errors": errors}


def lowered(shared: Shared) -> Any:
    """Steps on a static cache with the operators of a GPU's steps, as they are on the CPU."""
    passes = (
        *(FuseRankSums(), FuseProjections(), FuseAttention(), FuseRotary()),
        FuseExperts(),
    )
    lowering = phase_graph._lowering
    phase_graph._lowering = lambda key, backend: passes if key.static_cache else ()
    try:
        fast = build(shared.llamas[1], None, backend="eager")
        fast._adaskip.static_cache = True
        plan = SkipPlan.of(fast.adaskip.sublayers, ["1.attention"], decode_extra=["2.ffn"])
        follow(shared.oracle, plan)
        cache, reference, errors = fast.adaskip.new_cache(plan=plan), DynamicCache(), []
        for number, count in enumerate((9, 1, 1)):
            ids = tokens(1, count, number)
            with Calls() if number == 2 else nullcontext() as counted:
                logits = last(fast, ids, past_key_values=cache)
            errors.append(relative_error(logits, shared.oracle.step(ids, reference)[:, -1:]))
    finally:
        phase_graph._lowering = lowering
    return {
        "errors": errors,
        "operators": counted.own,
        "sums": counted.sums - shards_embeddings(shared.llamas[1]),
    }


def inductor(shared: Shared) -> Any:
    """Pieces that Inductor compiles."""
    fast = build(shared.llamas[1], None, backend="inductor")
    ids = tokens(2, 11, 1)
    more = {"max_new_tokens": 6, **_GREEDY}
    with torch.no_grad():
        return {
            "forward": relative_error(fast(ids).logits, shared.llamas[0](ids).logits),
            "generate": fast.generate(ids, **more).tolist()
            == shared.llamas[0].generate(ids, **more).tolist(),
        }


_HERE = (
    *(
        forward,
        replaced,
        generate,
        further,
        skipping,
        head_windows,
        plan_changes,
        memory_budget,
        calibrated,
        profiles,
        sampled,
    ),
    *(clocks, criteria, disagreements, refused, experts, whole_experts, backend, lowered, inductor),
)
CHECKS: dict[str, Callable[[Shared], Any]] = {
    **{check.__name__: check for check in _HERE},
    "families": families.families,
    "families of whole experts": families.whole_experts,
    **caches.CHECKS,
    **drafts.CHECKS,
    **failures.CHECKS,
    **fits.CHECKS,
    **replicas.CHECKS,
}


def main(folder: Path, *names: str) -> None:
    gc.collect()
    gc.freeze()  # captures end with collections, which need not look at the imports
    dist.init_process_group("gloo")
    shared, results = Shared(folder), dict[str, Any]()
    file = folder / f"results-{shared.rank}.json"
    for name in names:
        start = time.process_time()
        try:
            results[name] = CHECKS[name](shared)
        except Exception:
            results[name] = {"traceback": traceback.format_exc()}
        results[f"seconds of {name}"] = time.process_time() - start
        file.write_text(json.dumps(results))
        if isinstance(results[name], dict) and "traceback" in results[name]:
            os._exit(1)  # the others are told by the connection
    dist.destroy_process_group()
    results["end"] = True
    file.write_text(json.dumps(results))


if __name__ == "__main__":
    np.seterr(all="raise")
    main(Path(sys.argv[1]), *sys.argv[2:])
