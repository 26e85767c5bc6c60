"""Windows that calibration measures are what an eager model gives whose masks are written out."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Olmo2Config, Olmo2ForCausalLM

import adaskip_fx
from adaskip_fx import Profile, UnsupportedError
from adaskip_fx.api import build
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import Sublayer
from adaskip_fx.plans.windows import Window
from adaskip_fx.policies import WindowedBySimilarity
from adaskip_fx.runtime.similarity import measure_prompt, measure_windows
from adaskip_passes import run_passes
from adaskip_passes.windows.probe_windows import ProbeWindows
from tests.support.compiled_llamas import entry, make_model
from tests.support.custom_decoders import own
from tests.support.eager_windows import WindowedEager
from tests.support.tokenizers import LIMIT, Letters, ids_of

TEXTS = ("A decoder adds to its residual stream, twice a layer.", "sixteen letters.")
WINDOWS = (Window(12, 4), Window(30, 0))
MODULE = importlib.import_module("adaskip_fx.calibration.calibrate")


def post_norms() -> Any:
    """OLMo 2 normalizes what attention gives, so that heads do not just add up."""
    config = Olmo2Config(
        **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.25},
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    )
    torch.manual_seed(0)
    return Olmo2ForCausalLM(config).eval()


def parallel() -> Any:
    """GPT-NeoX adds attention and FFN of the same stream; it calls its parts otherwise."""
    config = GPTNeoXConfig(
        **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "initializer_range": 0.25, "max_position_embeddings": 128},
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
    )
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(config).eval()


def called_as_llama(model: Any) -> Any:
    """A copy in float64 whose parts have the names that Llama's have."""
    twin = copy.deepcopy(model).double()
    if not hasattr(twin, "model"):
        twin.model = twin.gpt_neox
        twin.config.num_key_value_heads = twin.config.num_attention_heads
        for layer in twin.model.layers:
            layer.self_attn = layer.attention
    return twin


#: Of a model, and what of its layers gives the branch of attention.
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "grouped": (lambda: make_model("grouped"), "self_attn.o_proj"),
    "equal_heads": (lambda: make_model("equal_heads"), "self_attn.o_proj"),
    "post_norms": (post_norms, "post_attention_layernorm"),
    "parallel": (parallel, "attention.dense"),
}


class ByHand:
    """Each head of each layer alone in a run of its own, in float64, all else seen in full."""

    def __init__(self, model: Any, branch: str) -> None:
        self.eager = WindowedEager(called_as_llama(model))
        self.layers = self.eager.model.model.layers
        self.seen: list[torch.Tensor] = []
        self.branch = branch
        self.heads = self.eager.model.config.num_key_value_heads

    def sums(
        self, ids: torch.Tensor, window: Window, firsts: Sequence[int] = (0,)
    ) -> np.ndarray[Any, Any]:
        """[layers * K/V heads, batch, 3]: of 1 - cosine, its power of 3/2, and tokens."""
        return np.stack(
            [
                self._head(ids, window, firsts, layer, head)
                for layer in range(len(self.layers))
                for head in range(self.heads)
            ]
        )

    def _head(
        self, ids: torch.Tensor, window: Window, firsts: Sequence[int], layer: int, head: int
    ) -> np.ndarray[Any, Any]:
        others = tuple(h for h in range(self.heads) if h != head)
        after, plain = self._branch(ids, firsts, layer, None)
        _, narrow = self._branch(ids, firsts, layer, (window.sinks, window.tokens, others))
        change = 1 - torch.cosine_similarity(after, after + narrow - plain, dim=-1)
        rows = [change[row, first:] for row, first in enumerate(firsts)]
        return np.array([[r.sum(), (r.clamp_min(0) ** 1.5).sum(), len(r)] for r in rows])

    def _branch(
        self, ids: torch.Tensor, firsts: Sequence[int], layer: int, seen: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream after a layer, and what its attention added to it."""
        kept: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_: Any, __: Any, output: Any) -> None:
                kept[name] = output[0] if isinstance(output, tuple) else output

            return hook

        block = self.layers[layer]
        handles = [
            block.register_forward_hook(keep("after")),
            block.get_submodule(self.branch).register_forward_hook(keep("branch")),
        ]
        windows = {} if seen is None else {layer: seen}
        self.eager.logits(ids, firsts, [windows] * ids.shape[1])
        for handle in handles:
            handle.remove()
        return kept["after"], kept["branch"]


@functools.cache
def _case(name: str) -> tuple[Any, ByHand, Profile]:
    make, branch = MODELS[name]
    model = make()
    found = adaskip_fx.calibrate(model, Letters(), TEXTS, LIMIT, windows=WINDOWS)
    return model, ByHand(model, branch), found


@pytest.fixture(
    params=[
        m if m in ("grouped", "parallel") else pytest.param(m, marks=pytest.mark.slow)
        for m in MODELS
    ]
)
def case(request: pytest.FixtureRequest) -> tuple[Any, ByHand, Profile]:
    return _case(request.param)


@pytest.fixture(scope="module")
def grouped() -> tuple[Any, ByHand, Profile]:
    return _case("grouped")


def close(measured: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    np.testing.assert_allclose(measured, expected, rtol=2e-4, atol=1e-9)


def test_the_sums_are_those_of_an_eager_model_with_masks(
    case: tuple[Any, ByHand, Profile],
) -> None:
    _, by_hand, profile = case
    assert profile.windows is not None
    measured = profile.windows.statistics
    assert measured.shape == (2, len(by_hand.layers) * by_hand.heads, 2, 3)
    for number, window in enumerate(WINDOWS):
        expected = by_hand.sums(ids_of(TEXTS[0]), window)[:, 0]
        assert expected[:, 0].min() > 1e-3, "each head matters"
        close(measured[0, :, number], expected)


def test_another_window_or_head_would_be_seen(grouped: tuple[Any, ByHand, Profile]) -> None:
    """The companion: one token or sink more or less, and the heads the other way round."""
    _, by_hand, profile = grouped
    assert profile.windows is not None
    measured, ids = profile.windows.statistics[0, :, 0], ids_of(TEXTS[0])
    for wrong in (Window(13, 4), Window(11, 4), Window(12, 3)):
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            close(measured, by_hand.sums(ids, wrong)[:, 0])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        close(measured[::-1], by_hand.sums(ids, WINDOWS[0])[:, 0])


def test_a_text_within_the_window_changes_by_nothing(case: tuple[Any, ByHand, Profile]) -> None:
    """Sixteen tokens, of windows of 12 + 4 and 30."""
    _, _, profile = case
    assert profile.windows is not None
    assert not profile.windows.statistics[1, ..., :2].any()
    assert (profile.windows.statistics[1, ..., 2] == 16).all()


def test_averages_are_over_all_tokens(grouped: tuple[Any, ByHand, Profile]) -> None:
    _, by_hand, profile = grouped
    assert profile.windows is not None
    change, power, _ = by_hand.sums(ids_of(TEXTS[0]), WINDOWS[0])[:, 0].T
    heads = [
        (Sublayer(layer, "attention"), head)
        for layer in range(len(by_hand.layers))
        for head in range(by_hand.heads)
    ]
    means = profile.windows.dissimilarity(WINDOWS[0])
    assert list(means) == heads
    assert list(means.values()) == pytest.approx((power / (53 + 16)) ** (2 / 3), rel=2e-4)
    mean = profile.windows.dissimilarity(WINDOWS[0], "mean")
    assert list(mean.values()) == pytest.approx(change / (53 + 16), rel=2e-4)
    with pytest.raises(ValueError, match="unknown average 'median': use 'power' or 'mean'"):
        profile.windows.dissimilarity(WINDOWS[0], "median")  # type: ignore[arg-type]


def test_rows_are_measured_without_their_padding() -> None:
    """Positions, and so the sinks, are counted from a row's first token."""
    bank = entry("grouped")
    ids, mask = bank.tokens(2, 24), torch.ones(2, 24, dtype=torch.int64)
    mask[1, :5] = 0
    _, measured = measure_windows(bank.runtime, ids, [Window(6, 2)], mask)
    expected = ByHand(bank.model, "self_attn.o_proj").sums(ids, Window(6, 2), (0, 5))
    close(measured[:, 0].double().numpy(), expected)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):  # the companion
        close(measured[:, 0].double().numpy()[::-1], expected)


def test_nothing_else_depends_on_windows(grouped: tuple[Any, ByHand, Profile]) -> None:
    """Of the same runs: the same statistics, and without windows the profile that there was."""
    model, _, profile = grouped
    plain = adaskip_fx.calibrate(model, Letters(), TEXTS, LIMIT)
    assert plain.windows is None
    np.testing.assert_array_equal(plain.statistics, profile.statistics)
    assert plain.layers is not None
    assert profile.layers is not None
    np.testing.assert_array_equal(plain.layers, profile.layers)
    rest = {name: getattr(profile, name) for name in ("versions", "calibration", "layers")}
    stripped = Profile(profile.sublayers, profile.statistics, profile.fingerprint, **rest)
    assert plain == stripped != profile
    assert str(plain).split(":", 1)[1] in str(profile)
    assert "window" not in str(plain)
    assert str(profile).endswith("K/V heads measured through window 4+12, window 0+30")


def test_the_model_is_run_once_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def counted(runtime: Any, ids: torch.Tensor, *more: Any) -> Any:
        runtime.runner.observer = lambda _, __, tokens: runs.append(tokens)
        return measure_windows(runtime, ids, *more)

    monkeypatch.setattr(MODULE, "measure_windows", counted)
    adaskip_fx.calibrate(make_model("grouped"), Letters(), TEXTS, LIMIT, windows=WINDOWS)
    assert runs == [53, 16]


def test_a_stream_without_a_direction_counts_for_nothing() -> None:
    """Padding that is not masked: its stream is zero in a layer that adds nothing."""
    model = make_model("one_layer")
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0
    runtime = runtime_of(build(model, None, backend="eager"))
    ids = ids_of(TEXTS[0])
    _, before = measure_windows(runtime, ids, [Window(6, 2)])
    padded = torch.nn.functional.pad(ids, (3, 0))
    _, after = measure_windows(runtime, padded, [Window(6, 2)])
    assert before[..., 2].unique().tolist() == [53]
    assert after[..., 2].unique().tolist() == [53]
    assert torch.isfinite(after).all()


def test_the_profile_goes_on_to_a_plan(grouped: tuple[Any, ByHand, Profile], tmp_path: Any) -> None:
    """Saved, loaded by `compile`: the heads that change least have the window."""
    model, by_hand, profile = grouped
    profile.save(tmp_path / "tiny.adaskip")
    policy = WindowedBySimilarity(WINDOWS[0], context=64)
    fast = adaskip_fx.compile(model, tmp_path / "tiny.adaskip", 1.2, policy=policy, backend="eager")
    powers = by_hand.sums(ids_of(TEXTS[0]), WINDOWS[0])[:, 0, 1]
    narrow = set()
    for sublayer, window in fast.adaskip.plan.windows.prefill.items():
        heads = set(range(by_hand.heads)) - set(window.full_heads)
        narrow |= {sublayer.layer * by_hand.heads + head for head in heads}
    assert narrow == set(np.argsort(powers)[: len(narrow)].tolist())
    assert 0 < len(narrow) < len(powers)
    assert fast.generate(ids_of(TEXTS[0]), max_new_tokens=2).shape == (1, 55)


def test_bfloat16_does_not_hide_small_changes() -> None:
    """They are differences of branches: a stream in bfloat16 has no place for them."""
    exact, rounded = (
        measure_windows(entry("biased", t).runtime, ids_of(TEXTS[0]), [Window(40, 4)])[1]
        for t in (torch.float32, torch.bfloat16)
    )
    torch.testing.assert_close(rounded[..., 0], exact[..., 0], rtol=0.1, atol=0)


# Refused ----------------------------------------------------------------------------------------

CASES: list[tuple[list[Window], str]] = [
    (
        [WINDOWS[0], Window(50, 4)],
        "a window 4\\+50 sees all of the longest text, which has 53 tokens: give longer texts, a "
        "larger max_length, or a smaller window",
    ),
    ([Window(9, 1, (0,))], "each head is measured alone: give window 1\\+9 .* without full_heads"),
    ([WINDOWS[0], WINDOWS[0]], "window 4\\+12 is given twice"),
]


@pytest.mark.parametrize(("windows", "message"), CASES)
def test_windows_that_say_nothing_are_refused_before_anything_is_captured(
    windows: list[Window], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("captured")

    monkeypatch.setattr(MODULE, "build", never)
    with pytest.raises(ValueError, match=message):
        adaskip_fx.calibrate(make_model("grouped"), Letters(), TEXTS, LIMIT, windows=windows)
    with pytest.raises(AssertionError, match="captured"):  # the companion
        adaskip_fx.calibrate(make_model("grouped"), Letters(), TEXTS, LIMIT, windows=WINDOWS)


def test_a_model_without_attention_for_windows_is_refused() -> None:
    def few(text: str, **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": ids_of(text) % 31}

    model = own().eval()
    message = "no attention of this model can have a window: calibrate without windows"
    with pytest.raises(ValueError, match=message):
        adaskip_fx.calibrate(model, few, TEXTS, LIMIT, windows=WINDOWS)  # type: ignore[arg-type]


def _halved(_: Any, __: Any, output: torch.Tensor) -> None:
    output.mul_(0.5)


class _Apart(torch.nn.Module):
    """A projection that switches autocast off for itself."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            return self.inner(x)


def test_code_that_cannot_be_run_again_is_refused_by_name() -> None:
    halving, apart = make_model("one_layer"), make_model("one_layer")
    halving.model.layers[0].self_attn.o_proj.register_forward_hook(_halved)
    attention = apart.model.layers[0].self_attn
    attention.o_proj = _Apart(attention.o_proj)
    name = "layer 0's attention cannot be measured through a window"
    for model, why in ((halving, "it changes values in place"), (apart, "an autocast of its own")):
        with pytest.raises(ValueError, match=f"{name}: .*{why}"):
            adaskip_fx.calibrate(model, Letters(), TEXTS, LIMIT, windows=WINDOWS)
    assert adaskip_fx.calibrate(apart, Letters(), TEXTS, LIMIT).windows is None


def test_graphs_that_are_no_prompts_are_refused() -> None:
    """More tokens on a filled cache attend to what they have just stored."""
    bank = entry("grouped")
    cache = bank.runtime.new_cache(30)
    for tokens in (9, 5):
        bank.runtime.step(bank.tokens(1, tokens), None, None, cache, 1)
    captures = bank.runtime.graphs.states.current.captures
    extend = next(group[0] for key, group in captures.items() if key.phase == "extend")
    with pytest.raises(UnsupportedError, match=r"cannot be measured .*: it reads what it writes"):
        run_passes(extend.outer, (ProbeWindows((0,), ((4, 12),)),))
    with pytest.raises(UnsupportedError, match=r"sublayers \[9\] are not in the graph: nothing to"):
        run_passes(extend.outer, (ProbeWindows((9,), ((4, 12),)),))


def test_sublayers_are_measured_as_before() -> None:
    bank = entry("grouped")
    ids = bank.tokens(1, 20)
    statistics, _ = measure_windows(bank.runtime, ids, [Window(6, 2)])
    assert torch.equal(statistics, measure_prompt(bank.runtime, ids, layers=True))
