"""Texts packed into one row: the eager model's logits, whether it tells them apart or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaskip_fx.api import build
from adaskip_fx.model import packed_texts
from adaskip_fx.model.handle import runtime_of
from tests.support.compiled_llamas import entry
from tests.support.eager_reference import assert_close
from tests.support.families.all import tiny_config, tiny_model
from tests.support.hybrids import hybrid

IDS = torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.cat((torch.arange(4), torch.arange(7), torch.arange(1))).unsqueeze(0)
TWO = torch.stack((POSITIONS[0], torch.cat((torch.arange(5) + 2, torch.arange(7)))))
CASES: dict[str, dict[str, Any]] = {
    "three texts": {"input_ids": IDS[:1], "position_ids": POSITIONS},
    "five in two rows": {"input_ids": IDS, "position_ids": TWO},
    "the last tokens": {"input_ids": IDS, "position_ids": TWO, "logits_to_keep": 3},
    "some tokens": {
        **{"input_ids": IDS, "position_ids": TWO},
        "logits_to_keep": torch.tensor([0, 4, -1]),
    },
    "labels": {"input_ids": IDS, "position_ids": TWO, "labels": IDS},
    "hidden states": {"input_ids": IDS, "position_ids": TWO, "output_hidden_states": True},
    "the same in each row": {"input_ids": IDS, "position_ids": POSITIONS},
    "one text a row": {"input_ids": IDS, "position_ids": torch.arange(12).expand(2, -1) + 5},
    "with a mask": {"input_ids": IDS, "position_ids": TWO, "attention_mask": torch.ones(2, 12)},
    "with a cache": {"input_ids": IDS, "position_ids": TWO, "use_cache": True},
}


@torch.no_grad()
def check(compiled: Any, eager: Any, **given: Any) -> None:
    given = {"use_cache": False, **given}
    got, want = compiled(**given), eager(**given)
    assert_close(got.logits, want.logits, 1e-5, "logits")
    if want.loss is not None:
        assert_close(got.loss, want.loss, 1e-5, "loss")
    for i, (one, other) in enumerate(
        zip(got.hidden_states or (), want.hidden_states or (), strict=True)
    ):
        assert_close(one, other, 1e-5, f"hidden state {i}")


@pytest.mark.parametrize("case", CASES)
def test_a_call_gives_what_the_oracle_gives(case: str) -> None:
    bank = entry("grouped")
    with bank.using(bank.plan(["0.ffn"])):
        check(bank.compiled, bank.oracle.model, **CASES[case])


def test_embeddings() -> None:
    bank = entry("grouped")
    embedded = bank.model.get_input_embeddings()(IDS).detach()
    with bank.using():
        check(bank.compiled, bank.model, inputs_embeds=embedded, position_ids=TWO)


def test_keys_and_values_take_as_much_as_there_are_tokens() -> None:
    """One long text and short ones; padded, they would take the long one's for each."""
    lengths = [240, *[3] * 20]
    ids = torch.randint(1, 50, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([*map(torch.arange, lengths)]).unsqueeze(0)
    bank = entry("grouped")
    runtime, held = runtime_of(bank.compiled), list[int]()
    with bank.using():
        runtime.observer = lambda program, plan, count: held.append(runtime.cache_bytes)
        try:
            check(bank.compiled, bank.model, input_ids=ids, position_ids=positions)
            for rows in (1, 21):  # of blocks of 256 tokens; the near miss
                bank.compiled(ids[:, :240].expand(rows, -1), use_cache=False)
        finally:
            runtime.observer = None
    assert held == [2 * held[1], held[1], 21 * held[1]]


@pytest.mark.breaks
def test_texts_that_see_one_another_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    monkeypatch.setattr(packed_texts, "_tells_apart", lambda model: False)
    bank = entry("grouped")
    with bank.using(), pytest.raises(AssertionError, match="logits: relative error"):
        check(bank.compiled, bank.model, **CASES["three texts"])


@pytest.mark.slow
def test_a_model_that_takes_all_for_one_text() -> None:
    model = tiny_model(tiny_config("gptj"))
    apart = []
    inner = packed_texts._tells_apart
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_texts, "_tells_apart", lambda m: apart.append(inner(m)) or apart[-1])
        check(build(model, None, backend="eager"), model, **CASES["five in two rows"])
    assert len(apart) == 1


def test_some_layers_alone_are_refused() -> None:
    """Attention tells the texts apart, the mixer's state goes on."""
    _, compiled = hybrid()
    with pytest.raises(NotImplementedError, match=r"begin again .* in some of its layers alone"):
        compiled(**CASES["three texts"], use_cache=False)
