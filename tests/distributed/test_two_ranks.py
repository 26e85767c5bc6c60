"""Models that transformers' tensor parallelism spreads over two processes (gloo, CPU).

Two processes run the checks of `worker` once for all tests of this file, which look at what each
of them wrote.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.families import FAMILIES, WHOLE_EXPERTS
from tests.distributed.processes import Found, run

_CHECKS = (
    *(
        "forward",
        "replaced",
        "generate",
        "skipping",
        "head_windows",
        "plan_changes",
        "sampled",
        "clocks",
        "criteria",
        "disagreements",
        "refused",
    ),
    *("calibrated", "experts", "replicas", "drafted", "saved", "killed"),
)
_SLOW = (
    *("memory_budget", "further", "profiles", "lowered", "backend", "inductor", "whole_experts"),
    *("fitted", "distilled"),
)
_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run(tmp_path_factory.mktemp("ranks"), *_CHECKS, seconds=550)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run(tmp_path_factory.mktemp("slow_ranks"), *_SLOW, seconds=900)


# What is computed ------------------------------------------------------------------------------


def test_logits_are_those_of_one_process(found: Found) -> None:
    for result in found.of("forward"):
        errors = {k: v for k, v in result.items() if isinstance(v, float)}
        assert errors.keys() == {"transformers", "ours", "ours beside theirs", "padded"}
        assert max(errors.values()) < _TOLERANCE


def test_layers_that_are_alike_are_copied_and_hold_plain_tensors(found: Found) -> None:
    for result in found.of("forward"):
        assert result["why traced"] == []
        assert result["tensors"] == ["Parameter"]  # no DTensor
        assert result["contiguous"]  # as kernels of a GPU's steps ask for


def test_a_sharded_tensor_that_is_replaced_in_the_original_is_followed(found: Found) -> None:
    for result in found.of("replaced"):
        assert result["error"] < _TOLERANCE
        assert result["changed"] > 0.01
        assert result["back"] == 0


def test_generate_gives_the_tokens_of_one_process_and_stores_a_ranks_heads(found: Found) -> None:
    for result in found.of("generate"):
        assert result["equal"]
        assert result["heads"] == [1]  # of two


def test_skipping_gives_the_references_logits(found: Found) -> None:
    for result in found.of("skipping"):
        assert len(result) == 3
        for plan, steps in result.items():
            assert max(steps["errors"]) < _TOLERANCE, plan


def test_a_skipped_sublayer_has_no_collective(found: Found) -> None:
    """One sum for each sublayer that runs; that of the embeddings is not counted."""
    of_plans = {
        "nothing": [8, 8, 8, 8],
        "1.attention 2.ffn in decode": [7, 6, 6, 7],
        "0.attention 3.ffn": [6, 6, 6, 6],
    }
    for result in found.of("skipping"):
        assert {plan: steps["sums"] for plan, steps in result.items()} == of_plans


def test_what_is_skipped_stores_nothing(found: Found) -> None:
    for result in found.of("skipping"):
        assert [steps["stored"] for steps in result.values()] == [
            *([0, 1, 2, 3], [0, 2, 3]),
            [1, 2, 3],
        ]


def test_windows_leave_the_heads_full_that_are_asked_for(found: Found) -> None:
    for result in found.of("head_windows"):
        assert result["heads"] == [2]  # of both ranks
        assert result["as asked"] < _TOLERANCE
        assert result["on the other"] > 0.01  # companion: it is seen which rank's head it is
        assert result["over"].endswith("full, but there are 2, from 0 on")


def test_plans_change_in_mid_request(found: Found) -> None:
    for result in found.of("plan_changes"):
        assert max(result["errors"]) < _TOLERANCE


@pytest.mark.slow
def test_ranks_keep_the_same_within_a_budget(slow: Found) -> None:
    """Whatever each of them holds besides: else one would link while the other runs."""
    first, second = slow.of("memory_budget")
    assert first["kept"] == second["kept"]
    assert first["kept"][2] >= 2, "programs were dropped"
    for result in (first, second):
        assert max(result["errors"]) < _TOLERANCE
        assert result["other"].startswith("RanksError: ranks do not agree on the memory budget: ")


def test_experts(found: Found) -> None:
    for result in found.of("experts"):
        assert max(result["whole"], result["skipped"]) < _TOLERANCE
        assert result["fingerprint"]  # as of the model in one process


def test_calibration_gives_what_one_process_computes(found: Found) -> None:
    first, second = found.of("calibrated")
    assert first["statistics"] == second["statistics"]  # to the bit
    assert first["fingerprint"]
    assert second["fingerprint"]
    measured, expected = np.array(first["statistics"]), np.array(first["by hand"])
    np.testing.assert_allclose(measured, expected, rtol=1e-5)


# What ranks agree on ---------------------------------------------------------------------------


def test_all_ranks_have_the_tokens_that_the_first_draws(found: Found) -> None:
    first, second = found.of("sampled")
    assert first == second
    assert first["drawn"] == first["alone"]  # with the first one's seed


def test_time_is_over_where_it_is_on_the_first_rank(found: Found) -> None:
    for result in found.of("clocks"):
        assert result == {"first": 1, "other": 4}


def test_a_text_ends_where_a_criterion_says_on_the_first_rank(found: Found) -> None:
    """It is asked on both, as often: at 9 tokens of 7 for the first time at 8."""
    for result in found.of("criteria"):
        assert result == {"first": [9, 2], "other": [12, 5]}


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ("plan", "ranks do not agree on a plan: "),
        ("plan of a request", "ranks do not agree on a plan: "),
        ("alpha", "ranks do not agree on the profile, alpha and options to compile with: "),
        ("prompt", "ranks do not agree on a prompt and its plan: "),
        ("tokens", "ranks do not agree on a prompt and its plan: "),
    ],
)
def test_what_differs_is_refused_on_both(found: Found, asked: str, text: str) -> None:
    results = found.of("disagreements")
    assert results[0][asked] == results[1][asked]
    assert results[0][asked].startswith(f"RanksError: {text}")
    assert " on rank 0, " in results[0][asked]
    assert results[0][asked].endswith(
        " on rank 1; give every rank the same model, profile, plan, alpha and inputs, of the same "
        "files"
    )


def test_plans_that_differ_while_decoding_are_refused_on_both(found: Found) -> None:
    for result in found.of("plan_changes"):
        assert result["other plans"].startswith(
            "RanksError: ranks do not agree on the plan of decoding: "
        )


def test_other_calls_are_refused_on_both(found: Found) -> None:
    for result in found.of("disagreements"):
        assert result["calls"] == (
            "RanksError: ranks are not at the same place: rank 0 at a prompt and its plan, rank 1 "
            "at a plan; make the same calls on all"
        )


def test_what_one_rank_refuses_all_refuse(found: Found) -> None:
    first, second = found.of("disagreements")
    assert first["one fails"] == second["one fails"]
    assert first["one fails"].startswith("ValueError: alpha, the acceleration ratio, must be")


def test_after_a_disagreement_all_go_on_as_before(found: Found) -> None:
    for result in found.of("disagreements"):
        assert result["plan still"]
        assert result["goes on"] == "nothing was raised"


def test_what_is_not_supported_is_refused_by_name(found: Found) -> None:
    several = "is not supported where a model is on several ranks; "
    texts = {
        "by head": f"1.attention: a window that leaves K/V heads full {several}which rank has",
        "clock": "max_time=1.0 of beam search is not supported where a model runs on several",
        "calibrated windows": f"calibrating windows by K/V head {several}each has heads",
        "pipeline": "the model is spread over processes by pipeline parallelism, which is not",
    }
    for result in found.of("refused"):
        assert result.keys() == texts.keys()
        for what, text in texts.items():
            assert text in result[what], what


# Texts that are shared out ----------------------------------------------------------------------


def of_replicas(found: Found, check: str) -> list[Any]:
    return [result[check] for result in found.of("replicas")]


def test_a_profile_of_shared_texts_is_that_of_one_process(found: Found) -> None:
    for result in of_replicas(found, "calibrated"):
        assert result["statistics"] == result["alone"]  # to the bit, in the order of the texts
        assert len(set(result["digests"])) == 1
        np.testing.assert_allclose(result["statistics"], result["by hand"], rtol=1e-5)


def test_each_process_measures_its_share_and_the_first_tells_of_it(found: Found) -> None:
    first, second = of_replicas(found, "calibrated")
    assert (first["measured"], second["measured"]) == (3, 2)
    assert first["progress"] == [[0, 5], [2, 5], [4, 5], [5, 5]]
    assert second["progress"] == []


def test_surrogates_fitted_to_shared_texts_are_those_of_one_process(found: Found) -> None:
    first, second = of_replicas(found, "fitted")
    assert first["digests"] == second["digests"]
    for result in (first, second):
        assert result["sums"] < 1e-12
        assert all(mine == own > 0 for mine, own in result["tokens"])
        assert result["errors"].keys() == {"scale", "diagonal", "linear"}
        assert max(result["errors"].values()) < 1e-6


@pytest.mark.parametrize(
    ("differing", "text"),
    [
        ("models", "RanksError: ranks do not agree on the model that each has: ("),
        ("texts", "RanksError: ranks do not agree on the texts to calibrate on: ("),
        ("spread", "ValueError: the model is itself spread over processes that data_parallel "),
    ],
)
def test_texts_are_shared_for_one_model_alone(found: Found, differing: str, text: str) -> None:
    first, second = of_replicas(found, "unlike")
    assert first[differing] == second[differing]
    assert first[differing].startswith(text)


def test_a_process_that_fails_at_a_text_is_told_to_the_others_who_can_go_on(found: Found) -> None:
    first, second = of_replicas(found, "failing")
    assert (first["measured"], second["measured"]) == (2, 2)  # of three: then it was heard
    for result in (first, second):
        assert result["texts"]["text"].startswith("ValueError: calibration text 0 has 3 tokens")
        assert result["device"]["text"] == "OutOfMemoryError: the device is full"
        assert max(result[at]["seconds"] for at in ("texts", "device")) < 30
        assert result["goes on"] == "nothing was raised"


@pytest.mark.slow
def test_models_on_two_ranks_each_share_texts_out(tmp_path: Path) -> None:
    results = run(tmp_path, "two_by_two", ranks=4).of("two_by_two")
    assert [result["measured"] for result in results] == [3, 3, 2, 2]
    for result in results:
        assert result["sharded"] == "DTensor"
        assert result["statistics"] == results[0]["statistics"]
        np.testing.assert_allclose(result["statistics"], result["alone"], rtol=1e-5)
        assert result["fitted"] < 1e-5


@pytest.mark.slow
def test_a_process_that_ends_is_told_to_the_others(tmp_path: Path) -> None:
    told = run(tmp_path, "one_gone").results[0]["one_gone"]
    assert told["text"].startswith("RanksError: another rank of this model is gone: ")
    assert told["seconds"] < 30


# What is drafted -------------------------------------------------------------------------------


def of_drafts(found: Found, check: str) -> list[Any]:
    return [result[check] for result in found.of("drafted")]


def test_rank_0s_clock_says_what_is_drafted_on_all(found: Found) -> None:
    first, second = of_drafts(found, "by_clock")
    assert first["equal"]
    assert second["equal"]
    assert first["rounds"] == second["rounds"] == first["of its own clock"]
    assert first["rounds"][0] > 0, "verifications"
    # the companion: left to its own clock the other rank would have run other programs
    assert second["of its own clock"] != second["rounds"]


def test_tokens_and_acceptance_are_the_first_ranks(found: Found) -> None:
    first, second = of_drafts(found, "rounding")
    assert first == second
    assert first["equal"]


def test_rows_that_accept_other_drafts_have_their_own_greedy_tokens(found: Found) -> None:
    first, second = of_drafts(found, "ragged")
    assert first == second
    assert first["equal"]
    assert 0 < first["rounds"][0] < 19, "some columns stand, and not all"


def test_ranks_run_ahead_together_and_stop_together(found: Found) -> None:
    first, second = of_drafts(found, "ahead")
    assert first == second
    assert first["equal"]
    assert first["stopped"]
    assert first["timed"], "by the first rank's clock"
    assert min(first["rounds"][:2]) > 0, "verifications, and plain steps between them"


def test_drawn_tokens_and_what_stands_of_drawn_drafts_are_the_firsts(found: Found) -> None:
    first, second = of_drafts(found, "at_random")
    assert first["drawn"] == second["drawn"] == first["alone"]  # with the first one's seed
    assert first["after"] == second["after"]


def test_divergence_is_that_of_the_first_rank_and_within_its_bound(found: Found) -> None:
    first, second = of_drafts(found, "bounded")
    assert first["ranks"] == second["ranks"]  # to the bit
    assert 0 < first["ranks"]["mean"] <= first["ranks"]["worst"] <= 0.5
    for key in ("worst", "mean"):
        assert first["ranks"][key] == pytest.approx(first["alone"][key], rel=1e-4)
    assert first["ranks"]["tokens"] == first["alone"]["tokens"]
    assert first["ranks"]["tokens"] != first["greedy"], "something was spent"


def test_one_coin_is_tossed_for_all(found: Found) -> None:
    first, second = of_drafts(found, "sampled_blocks")
    assert first == second
    _tokens, unverified, estimate, upper, verified = first
    assert unverified > 0
    assert verified > 0
    assert 0 < estimate <= upper


def test_plans_that_are_refined_are_the_first_ranks(found: Found) -> None:
    first, second = of_drafts(found, "refined")
    assert first == second
    assert first["equal"]
    assert first["told"] > len(first["plans"]) > 0  # each plan was sent once


def test_a_proposer_that_fails_on_the_first_rank_fails_on_all(found: Found) -> None:
    for result in of_drafts(found, "failing"):
        assert result["first"] == "KeyError: 'no such draft'"
        assert result["other"] == "nothing was raised"  # it was not asked
        assert result["goes on"]


def test_models_draft_for_one_another_on_ranks(found: Found) -> None:
    several = "is not supported where a model is on several ranks; load it whole in every process"
    for result in of_drafts(found, "more"):
        assert result["small assistant"]
        assert result["proposers"] == ["assistant"]
        assert result["as assistant"]
        assert (
            f"on several ranks itself, beside decoding=, {several}"
            in (result["assistant on ranks"])
        )
        assert result["options"].startswith("RanksError: ranks do not agree on decoding=: (")


# Caches in files -------------------------------------------------------------------------------


def test_each_rank_saves_its_share_and_goes_on_with_it(found: Found) -> None:
    results = found.of("saved")
    for result in results:
        assert result["files"] == ["prefix.0-of-2.safetensors", "prefix.1-of-2.safetensors"]
        assert result["tokens"] == result["greedy"]  # of one process, that has read the prefix
    assert results[0]["keys"].keys() == results[1]["keys"].keys()
    assert results[0]["keys"] != results[1]["keys"], "they are of other heads"


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ("of two in one process", "saved on 2 ranks, and this model is in one process: each has"),
        ("a share in one process", "saved by rank 1 of 2, and this model is in one process: each"),
        ("of one on two", "saved by one process, and this model is on 2 ranks: each has other"),
        ("of four on two", "saved on 4 ranks, and this model is on 2 ranks: each has other K/V"),
        ("the other's share", "saved by rank 1 of 2, and this model is rank 0 of 2: each has"),
        ("one is cut", ".1-of-2.safetensors: truncated, or not a saved cache"),
        ("nothing", "no such file; check the path, or run the prefix again and save its cache"),
    ],
)
def test_a_cache_of_other_ranks_is_refused_on_both(found: Found, asked: str, text: str) -> None:
    for result in found.of("saved"):
        assert result["refused"][asked].startswith("SavedCacheError: ")
        assert text in result["refused"][asked]
        assert result["refused"][asked].endswith("run the prefix again and save its cache")


def test_shares_of_two_caches_are_refused_on_both(found: Found) -> None:
    for result in found.of("saved"):
        mixed = result["refused"]["of two caches"]
        assert mixed.startswith("RanksError: ranks do not agree on a saved cache: ")


# What goes wrong -------------------------------------------------------------------------------


def test_a_killed_rank_is_told_to_the_other_at_once(found: Found) -> None:
    told = found.results[0]["killed"]
    assert told.keys() == {"drafted", "step", "next"}
    for step in told:
        assert told[step]["text"].startswith("RanksError: another rank of this model is gone: ")
        assert told[step]["seconds"] < 30
    assert found.codes == (0, 7)
    assert found.results[0]["end"]  # it ended by itself


@pytest.mark.slow
def test_a_killed_first_rank_is_told_to_those_that_follow_it(tmp_path: Path) -> None:
    found = run(tmp_path, "killed_first")
    told = found.results[1]["killed_first"]
    for step in told:
        assert told[step]["text"].startswith("RanksError: another rank of this model is gone: ")
        assert told[step]["seconds"] < 30
    assert found.codes == (7, 0)


@pytest.mark.slow
def test_a_streamer_that_fails_on_one_rank_is_told_to_one_that_waits_for_an_order(
    tmp_path: Path,
) -> None:
    first, second = run(tmp_path, "reader_gone").of("reader_gone")
    assert first["text"] == "ValueError: the reader is gone"
    assert second["text"] == (
        "RanksError: rank 0 of this model failed, and the others cannot go on: "
        "ValueError: the reader is gone"
    )
    assert second["seconds"] < 30


@pytest.mark.slow
def test_a_rank_that_fails_and_lives_on_is_told_to_one_that_waits_on_the_host(
    tmp_path: Path,
) -> None:
    found = run(tmp_path, "raising")
    first, second = found.of("raising")
    assert second["text"] == "OutOfMemoryError: the device is full"
    assert first["text"] == (
        "RanksError: rank 1 of this model failed, and the others cannot go on: "
        "OutOfMemoryError: the device is full"
    )
    assert first["seconds"] < 30
    assert found.codes == (0, 0)


@pytest.mark.slow
def test_a_rank_that_waits_in_a_collective_of_gloo_says_why_and_ends(tmp_path: Path) -> None:
    found = run(tmp_path, "blocked")
    assert "RanksError: rank 1 of this model failed" in found.errors[0]
    assert found.codes[0] == 1
    assert found.results[1]["blocked"]["text"] == "OutOfMemoryError: the device is full"


@pytest.mark.slow
def test_a_rank_that_stops_is_told_to_the_other(tmp_path: Path) -> None:
    found = run(tmp_path, "stopped", seconds=90)
    told = found.results[0]["stopped"]
    assert "is gone, or has stopped: nothing was heard of it" in told["text"]
    assert told["seconds"] < 30


# Slow relatives --------------------------------------------------------------------------------


@pytest.mark.slow
def test_whole_prompts_and_second_turns(slow: Found) -> None:
    for result in slow.of("further"):
        assert result["whole"] < _TOLERANCE
        assert result["second turn"]
        assert result["static cache"]
        assert result["why no static cache"] is None


@pytest.mark.slow
def test_profiles_serve_any_number_of_ranks(slow: Found) -> None:
    first, second = slow.of("profiles")
    alone = first.pop("alone")
    assert first == second
    assert first["tokens"] == first["by the profile of one"] == alone["tokens"]
    assert first["decode"] == alone["decode"]
    assert set(first["decode"]) > set(first["prefill"])  # the window has added something
    assert (first["fingerprint"], first["weights"]) == (alone["fingerprint"], alone["weights"])
    measured, expected = np.array(first["statistics"]), np.array(alone["statistics"])
    largest = np.abs(expected).max((0, 1))
    assert (np.abs(measured - expected) / largest).max() < 1e-6


@pytest.mark.slow
def test_whole_experts(slow: Found) -> None:
    for result in slow.of("whole_experts"):
        assert max(result["whole"], result["skipped"]) < _TOLERANCE
        assert result["experts"] == 2  # of four
        assert result["sums"] == 8  # one for each sublayer, none of tokens that are exchanged
        assert result["why traced"] == []
        assert result["fingerprint"]


@pytest.mark.slow
def test_experts_that_exchange_tokens_are_refused_by_name(slow: Found) -> None:
    for result in slow.of("whole_experts"):
        assert result["exchanged"] == (
            "UnsupportedError: the model is spread over processes by expert parallelism that "
            "exchanges tokens (AllToAllEP), which is not followed; load it with tensor parallelism"
            ": DistributedConfig(tp_size=N), with ep_size=N for whole experts"
        )


@pytest.fixture(scope="module")
def of_whole_experts(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("whole_experts")
    return run(folder, "families of whole experts", seconds=900)


@pytest.mark.slow
@pytest.mark.parametrize("family", WHOLE_EXPERTS)
def test_families_with_whole_experts(of_whole_experts: Found, family: str) -> None:
    for result in of_whole_experts.of("families of whole experts"):
        assert result[family]["error"] < _TOLERANCE
        assert result[family]["generate"]
        assert result[family]["stored"] == [True, False, True]
        assert result[family]["experts"] == 2


@pytest.fixture(scope="module")
def of_families(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run(tmp_path_factory.mktemp("families"), "families", seconds=1500)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(of_families: Found, family: str) -> None:
    for result in of_families.of("families"):
        assert result[family]["error"] < _TOLERANCE
        assert result[family]["generate"]
        assert result[family]["stored"] == [True, False, True]


@pytest.mark.slow
def test_the_operators_of_a_gpus_steps(slow: Found) -> None:
    for result in slow.of("lowered"):
        assert max(result["errors"]) < _TOLERANCE
        assert result["sums"] == 6  # sublayers that run
        assert result["operators"] >= 2 * 6


@pytest.mark.slow
def test_the_torch_compile_backend(slow: Found) -> None:
    for result in slow.of("backend"):
        assert max(result["errors"]) < _TOLERANCE


@pytest.mark.slow
def test_pieces_that_inductor_compiles(slow: Found) -> None:
    for result in slow.of("inductor"):
        assert result["forward"] < _TOLERANCE
        assert result["generate"]


@pytest.mark.slow
def test_the_whole_recipe_gives_all_ranks_one_plan(slow: Found) -> None:
    first, second = slow.of("fitted")
    assert first == second
    assert first["skipped"] == 2
    assert first["fitted"]
    begins = ("write 2 samples", "search", "fit 2 surrogates", "distilled: KL", "decoding may add")
    assert all(map(str.startswith, first["said"], begins))
    assert len(first["said"]) == len(begins)


@pytest.mark.slow
def test_distillation_descends_as_in_one_process(slow: Found) -> None:
    first, second = slow.of("distilled")
    for kind, tolerance in (("low_rank", 1e-5), ("linear", 1e-3)):
        ranks, alone = first[kind]
        assert ranks == second[kind][0]  # to the bit, surrogates as well
        assert ranks["losses"] == pytest.approx(alone["losses"], rel=tolerance)
        assert ranks["losses"][-1] < 0.95 * ranks["losses"][0]
    # the companion: without sums over ranks of gradients it descends elsewhere
    wrong, (right, _) = first["not summed"]["losses"], first["linear"]
    assert wrong[0] == right["losses"][0]
    assert wrong[1] != pytest.approx(right["losses"][1], rel=1e-3)
    assert first["compiled"].startswith(
        "UnsupportedError: distilling with compiled=True is not supported where a model is on "
    )


@pytest.mark.slow
def test_processes_end_by_themselves(slow: Found) -> None:
    assert slow.codes == (0, 0)
    assert all(results["end"] for results in slow.results)


# That the tests can fail -----------------------------------------------------------------------


def test_a_check_that_fails_is_an_error_with_its_traceback() -> None:
    failed: dict[str, Any] = {"forward": {"traceback": "Traceback: of rank 1"}}
    results = Found(({"forward": {"ours": 0.0}}, failed), (0, 1), ("", "said to stderr"))
    with pytest.raises(AssertionError, match="Traceback: of rank 1"):
        results.of("forward")
    with pytest.raises(AssertionError, match="rank 0 did not come to generate"):
        results.of("generate")
