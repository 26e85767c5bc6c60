"""The situations on a tiny model: what their rows say of each other, and floors worked out by hand.

The rates of the card are set to round numbers, so that a floor is known to the last digit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from adaskip_fx.plans.phase_split import prefill_only
from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from benchmarks import floors, models, situations
from benchmarks.ceilings import MatrixRate
from benchmarks.situations import SITUATIONS, bench, other_attention
from benchmarks.situations.bench import TOLERANCE, Bench, left_padded, positions, step_inputs
from benchmarks.situations.rows import Row, beyond, over

Document = dict[str, Any]

#: Numbers of the tiny model: sublayers of 8 layers (width 64, 4 heads of 16, 2 K/V heads, 128 in
#: the FFN), the head for 256 words, and what a layer stores of a token.
WEIGHTS = 8 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
HEAD = 64 * 256
STORED = 2 * 2 * 16
COPIED, MULTIPLIED = 1e9, 1e12  # the rates, a second

#: How many rows each situation has where all goes well.
ROWS = {
    **{"main_road": 4, "padded_decode": 2, "unpadded_decode": 3, "padded_prompt": 2},
    **{"new_length": 2, "new_batch": 5, "growth": 2, "turn": 3, "chunks": 1, "verify": 7},
    **{"logits_to_keep": 1, "generate_padded": 3, "many_requests": 3, "other_attention": 8},
    **{f"family_{name}": 5 for name in ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")},
    **{f"family_{name}": 6 for name in ("mamba2", "falcon_h1", "qwen3_next")},
}


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    """Everything on the CPU, and rates that are known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "device", lambda: torch.device("cpu"))
        patch.setattr(bench, "copy_rate", lambda device: COPIED)
        patch.setattr(MatrixRate, "sustained", lambda self: MULTIPLIED)
        models.pair.cache_clear()
        yield
    models.pair.cache_clear()


def _step(lengths: list[int]) -> float:
    """Milliseconds of a step's floor."""
    return 1000 * 4 * (WEIGHTS + HEAD + 8 * sum(lengths) * STORED) / COPIED


def _turn(tokens: int, stored: int = 0) -> float:
    """Milliseconds of a prompt's floor: scores and weighted values of half of the new pairs."""
    attention = 8 * 4 * 64 * tokens * (stored + tokens / 2)
    return 1000 * (2 * WEIGHTS * tokens + attention + 2 * HEAD) / MULTIPLIED


#: Floors by situation and the beginning of what is measured; blocks are of 4 steps, so that a
#: step reads 2 tokens more than the prompt in the mean.
FLOORS = {
    ("padded_decode", "step, 4 rows padded to 128: floor"): _step([130, 98, 66, 34]),
    **{
        ("unpadded_decode", f"step, {rows} rows at 128: floor"): _step([130] * rows)
        for rows in (2, 4, 8)
    },
    ("padded_prompt", "prompt, 4 rows padded to 128: floor"): sum(map(_turn, (128, 96, 64, 32))),
    ("turn", "turn of 16 tokens on 256: floor"): _turn(16, 256),
    ("main_road", "step at 128: floor"): _step([128]),
    ("main_road", "step at 256: floor"): _step([256]),
    ("main_road", "prompt of 128: floor"): _turn(128),
}


def broken(result: Document) -> set[str]:
    """Claims of a result that its own numbers deny."""
    found: set[str] = set()

    def same(claim: str, value: float, expected: float) -> None:
        if not math.isclose(value, expected, rel_tol=1e-9):
            found.add(claim)

    for row in result["rows"]:
        measured, reference = row["measured"], row["reference"]
        if reference is not None:
            same("ratio", row["ratio"], measured / reference)
        if row["of"] == "ratio":
            same("value", row["value"], measured / reference)
        floor = FLOORS.get((row["situation"], row["what"]))
        if floor is not None:
            same("floor", reference, floor)
        if row["eager_error"] is not None and row["eager_error"] > TOLERANCE[torch.float32]:
            found.add("eager_error")
        if row["target"] is not None:
            value, target = row["value"], row["target"]
            if row["met"] != (value >= target if row["at_least"] else value <= target):
                found.add("met")
    return found


def _counts(result: Document) -> dict[str, int]:
    names = [row["situation"] for row in result["rows"]]
    return {name: names.count(name) for name in dict.fromkeys(names)}


# Floors.


def test_floors_of_rows_as_numbers() -> None:
    """Sums of products that were worked out on paper."""
    model = models.llama()
    plan = SkipPlan.empty([Sublayer(i, k) for i in range(8) for k in ("attention", "ffn")])
    assert floors.kv_bytes(model, plan, 40) == 81_920
    assert floors.rows_bytes(model, plan, [10, 30]) == 1_327_104
    assert floors.rows_flop(model, plan, [10, 30]) == 24_682_496
    assert floors.turn_flop(model, plan, 16, 48) == 11_304_960
    assert floors.turn_flop(model, plan, 16) == floors.prefill_flop(model, plan, 16)
    assert floors.rows_bytes(model, plan, [7] * 3) == floors.decode_bytes(model, plan, 7, 3)
    assert (_step([10, 30]), _turn(16, 48)) == (1_327_104e-6, 11_304_960e-9)


def test_floors_of_the_large_shape_as_numbers() -> None:
    model = models.shape_8b()
    plan = SkipPlan.empty([Sublayer(i, k) for i in range(32) for k in ("attention", "ffn")])
    # 6,979,321,856 weights in the sublayers, 525,336,576 in the head, 128 KiB of a token's K/V
    assert floors.kv_bytes(model, plan, 1) == 131_072
    four = 2 * (6_979_321_856 + 525_336_576) + 131_072 * (8192 + 6144 + 4096 + 2048)
    assert floors.rows_bytes(model, plan, [8192, 6144, 4096, 2048]) == four
    pairs = 32 * 4 * 4096 * 512 * (32_768 + 256)
    turn = 2 * 6_979_321_856 * 512 + pairs + 2 * 525_336_576
    assert floors.turn_flop(model, plan, 512, 32_768) == turn


def test_attention_that_writes_its_keys_and_values_multiplies_by_two_projections() -> None:
    model = models.llama()
    sublayers = tuple(Sublayer(i, k) for i in range(8) for k in ("attention", "ffn"))
    whole = SkipPlan.empty(sublayers)
    plan = prefill_only(SkipPlan.of(sublayers, ["7.attention"]))
    lost = floors.prefill_flop(model, whole, 10) - floors.prefill_flop(model, plan, 10)
    assert lost == 2 * 10 * (2 * 64 * 64) + 4 * 50 * 64  # query and output; pairs of tokens
    assert floors.decode_bytes(model, plan, 10) == floors.decode_bytes(model, whole, 10)


def test_padding_and_what_a_step_is_given() -> None:
    mask = left_padded(4, (0, 0.25, 0.75))
    assert mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]]
    assert bench.real_lengths(mask) == [4, 3, 1]
    assert positions(mask).tolist() == [[0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 0, 0]]
    second = step_inputs(mask, 1)
    assert second["attention_mask"].tolist() == [[*row, 1, 1] for row in mask.tolist()]
    assert second["position_ids"].tolist() == [[5], [4], [2]]


# Rows.


@pytest.mark.parametrize(
    ("row", "value", "met"),
    [
        (over("x", 0.012, 0.010, 1.2), 1.2, True),
        (over("x", 0.0121, 0.010, 1.2), 1.21, False),
        (over("x", 0.012, 0.010, None), 1.2, None),
        (over("x", 0.012, 0.010, 1.2, eager_error=0.01), 1.2, True),
        (over("x", 0.012, 0.010, 1.2, eager_error=0.02), 1.2, False),
        (over("x", 0.012, 0.010, 1.2, eager_error=math.nan), 1.2, False),
        (beyond("x", 0.012, 0.010, 1.5), 2.0, False),
        (beyond("x", 0.012, 0.010, 1.5, chosen=1.0), 1.0, True),
        (Row("x", 95.0, 100.0, 0.95, at_least=True), 0.95, True),
        (Row("x", 94.0, 100.0, 0.95, at_least=True), 0.94, False),
        (Row("x", 2, None, 1, of="measured"), 2, False),
        (Row("x", 30.0, 4.0, 60, of="measured"), 30.0, True),
    ],
)
def test_what_a_target_is_of(row: Row, value: float, met: bool | None) -> None:
    document = row.document(tolerance=0.01)
    assert document["value"] == pytest.approx(value, rel=1e-12)
    assert document["met"] is met


# Measuring.


def test_some_situations() -> None:
    result = situations.measure(only=("turn", "chunks"))
    assert set(result) == {"model", "dtype", "tolerance", "rows", "runs"}
    assert result["model"] == {"layers": 8, "hidden": 64}
    assert _counts(result) == {"turn": 3, "chunks": 1}
    assert list(result["runs"]) == ["turn", "chunks"]
    assert broken(result) == set()
    for path, claim in (
        (("reference",), "floor"),
        (("measured",), "ratio"),
        (("value",), "value"),
    ):
        wrong = copy.deepcopy(result)
        wrong["rows"][0][path[0]] *= 1.001
        assert claim in broken(wrong)


@pytest.mark.slow
def test_every_situation_has_its_rows() -> None:
    result = situations.measure()
    assert [row for row in result["rows"] if "failed" in row] == []
    assert _counts(result) == ROWS
    assert list(ROWS) == list(SITUATIONS)
    assert broken(result) == set()
    known = {(row["situation"], row["what"]) for row in result["rows"]}
    assert set(FLOORS) <= known
    lines = situations.summary(result).splitlines()
    assert len(lines) == 1 + sum(ROWS.values()) + 2
    assert lines[-2].endswith(" of 79 targets met, 0 situations failed")


@pytest.mark.slow
def test_what_a_step_of_another_attention_reads() -> None:
    """Worked out on paper, of two layers: of DeepSeek's latents, and of windows of 32 tokens."""
    found = {}
    for name in ("DeepSeek-V3, dense", "Gemma 2 9B"):
        one = other_attention._Other(other_attention.SHAPES[name])
        with torch.inference_mode():
            found[name] = [one.floor_bytes(one.filled(models.tokens(1, n))) for n in (40, 140)]
    latents = found["DeepSeek-V3, dense"]
    assert latents[1] - latents[0] == 4 * 2 * 100 * (32 + 8)
    slides = found["Gemma 2 9B"]
    assert slides[1] - slides[0] == 4 * 100 * 2 * 2 * 16  # one of two layers sees everything
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 4 * 64) + 64 * 256
    assert slides[0] == 4 * (weights + (40 + 32) * 2 * 2 * 16)


def test_logits_of_another_model_are_noticed() -> None:
    one = Bench()
    with torch.inference_mode():
        assert one.eager_error((32, 1)) < TOLERANCE[torch.float32]
        one.model = models.llama(rms_norm_eps=1e-2)
        assert one.eager_error((32, 1)) > 0.1
