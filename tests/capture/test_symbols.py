"""Pieces of captured models have the symbols that describe their inputs, in every phase."""

from __future__ import annotations

import pytest
import torch

from adaskip_fx.plans.phase_split import decode_only, prefill_only
from adaskip_fx.programs.rewrite import plan_phase, rewrite
from adaskip_passes.partition.outer import piece_of
from tests.support.compiled_llamas import entry
from tests.support.symbols import missing_symbols


@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_compilers_cache_finds_every_symbol(padded: bool) -> None:
    bank = entry("grouped")
    cache, seen = bank.runtime.new_cache(), 0
    for count in (6, 1, 4, 1):
        seen += count
        mask = torch.ones(2, seen, dtype=torch.int64)
        mask[1, 2] = int(not padded)  # a hole
        with torch.no_grad():
            ids = bank.tokens(2, count)
            bank.compiled(ids, attention_mask=mask, past_key_values=cache)
    captures = [c for found in bank.runtime.graphs.states.current.captures.values() for c in found]
    phases = {(c.key.phase, c.key.masked) for c in captures}
    assert {("extend", padded), ("decode", padded)} <= phases
    skipped = bank.plan(["0.attention", "1.ffn"], factors={"0.attention": 0.9})
    plans = bank.plan(), skipped, prefill_only(skipped), decode_only(skipped)
    roles = set()
    for captured in captures:
        for plan in plans:
            outer = rewrite(
                captured.outer,
                captured.sublayers,
                plan,
                plan_phase(captured.key.phase),
                probed=captured.sublayers[1:2],
            )
            for node in outer.graph.nodes:
                piece = piece_of(node)
                if piece is not None:
                    roles.add(piece.role)
                    assert not missing_symbols(piece), f"{captured.key.phase} {piece.name}"
    assert roles == {"prologue", "sublayer", "epilogue", "residue", "surrogate", "probe"}
