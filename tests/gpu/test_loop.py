"""`generate` on a GPU, where its loop runs ahead, against transformers' own loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation import GenerationMixin

from tests.support.generation import Collected
from tests.support.on_gpu import OnGpu, on_gpu

SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 2.0}


def generated(bank: OnGpu, seed: int, **options: Any) -> tuple[list[int], list[int], float, int]:
    """Tokens, streamed tokens, the next random number, and the length of the cache."""
    torch.manual_seed(seed)
    ids, streamer = bank.tokens(1, 6), Collected()
    result = bank.compiled.generate(
        ids, max_new_tokens=20, return_dict_in_generate=True, streamer=streamer, **options
    )
    random = torch.rand(1, device="cuda").item()
    length = result.past_key_values.get_seq_length()
    return result.sequences[0].tolist(), streamer.tokens, random, length


@pytest.mark.parametrize("sampling", [{"do_sample": False}, SAMPLING, {**SAMPLING, "top_k": 7}])
def test_ahead_on_a_gpu(sampling: dict[str, Any]) -> None:
    bank = on_gpu()
    assert bank.runtime.ahead
    with bank.using():
        for seed in range(5):
            for more in ({}, {"eos_token_id": list(range(1, 60, 4)), "pad_token_id": 0}):
                mine = generated(bank, seed, **sampling, **more)
                bank.runtime.ahead = False
                waiting = generated(bank, seed, **sampling, **more)
                bank.runtime.ahead = True
                theirs = _by_transformers(bank, seed, **sampling, **more)
                assert mine == waiting
                assert (mine[0], mine[2], mine[3]) == theirs
                assert mine[0] == mine[1]


def _by_transformers(bank: OnGpu, seed: int, **options: Any) -> tuple[list[int], float, int]:
    torch.manual_seed(seed)
    result = bank.compiled.generate(
        bank.tokens(1, 6),
        max_new_tokens=20,
        return_dict_in_generate=True,
        custom_generate=GenerationMixin._sample,
        **options,
    )
    random = torch.rand(1, device="cuda").item()
    length = result.past_key_values.get_seq_length()
    return result.sequences[0].tolist(), random, length


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
def test_a_prompt_on_the_cpu() -> None:
    """As transformers' loop: tokens stay where the caller has them."""
    bank = on_gpu()
    ids, options = bank.tokens(1, 6), {"max_new_tokens": 9, "do_sample": False}
    with bank.using():
        want = bank.compiled.generate(ids, **options)
        got = bank.compiled.generate(ids.cpu(), **options)
    assert got.device.type == "cpu"
    assert torch.equal(got, want.cpu())
