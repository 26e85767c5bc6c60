"""Windows on a GPU: the kernel of prompts, bounds of heads under CUDA graphs, memory that goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from adaskip_fx.api import build
from adaskip_fx.fitting import DistillConfig, Fitter, Sample, SurrogateSpec, distill
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.windows import Window, Windows
from adaskip_passes.decode.ops import EVERY
from adaskip_passes.windows.ops import attend_windowed
from tests.support.eager_windows import WindowedEager
from tests.support.fits import LIMIT, TEXTS
from tests.support.tokenizers import Letters

TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("softcap", "with_sinks"), [(0.0, False), (1.5, False), (0.0, True)])
@pytest.mark.parametrize(
    ("tokens", "stored", "heads", "dim", "windows"),
    [
        (300, 300, 2, 64, [(4, 100), (4, 100)]),
        (300, 300, 4, 128, [(4, 33), (0, EVERY), (4, 33), (0, EVERY)]),
        (70, 900, 2, 128, [(16, 64), (3, 800)]),
        (1, 500, 2, 64, [(4, 50), (0, 1)]),
        (200, 200, 1, 256, [(100, 20)]),
        (130, 130, 1, 40, [(4, 500)]),
    ],
)
def test_against_scores_of_float64(
    dtype: torch.dtype,
    softcap: float,
    with_sinks: bool,
    tokens: int,
    stored: int,
    heads: int,
    dim: int,
    windows: Any,
) -> None:
    torch.manual_seed(0)
    shapes = ((heads * 4, tokens), (heads, stored), (heads, stored))
    q, k, v = (torch.randn(2, h, n, dim, device="cuda").to(dtype) for h, n in shapes)
    sinks_of = torch.linspace(-2, 3, heads * 4, device="cuda").to(dtype) if with_sinks else None
    got = attend_windowed(q, k, v, torch.tensor(windows), EVERY, dim**-0.5, softcap, sinks_of)
    assert got.is_contiguous()
    noise = _error(got, _scores(q, k, v, windows, softcap, sinks_of))
    assert noise < TOLERANCES[dtype]
    if any(sinks + last < stored for sinks, last in windows):
        farther = [(sinks, last + 1) for sinks, last in windows]
        assert _error(got, _scores(q, k, v, farther, softcap, sinks_of)) > 2 * noise
    if softcap or with_sinks:
        assert _error(got, _scores(q, k, v, windows)) > 2 * noise


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    windows: Any,
    softcap: float = 0.0,
    sinks_of: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention with explicit masks in float64, [rows, tokens, heads, dim]."""
    (heads, tokens, dim), stored = q.shape[1:], k.shape[2]
    own = torch.arange(stored - tokens, stored, device="cuda").unsqueeze(1)
    j = torch.arange(stored, device="cuda")
    found = []
    for head in range(heads):
        group = head // (heads // k.shape[1])
        sinks, last = windows[group]
        scores = q[:, head].double() @ k[:, group].double().mT * dim**-0.5
        near = (j <= own) & ((j > own - last) | (j < sinks))
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~near, float("-inf")).exp()
        more = 0.0 if sinks_of is None else sinks_of[head].double().exp()
        found.append(weights / (weights.sum(-1, keepdim=True) + more) @ v[:, group].double())
    return torch.stack(found, 2)


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("firsts", [(0,), (0, 5, 11)])
def test_a_request_sees_its_windows(dtype: torch.dtype, firsts: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=61,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    eager = WindowedEager(model.float())
    model = model.to(dtype).cuda()
    compiled = build(model, None, backend="eager")
    attention = [s for s in compiled.adaskip.sublayers if s.kind == "attention"]
    first = torch.tensor(firsts).unsqueeze(1)
    text = torch.randint(0, 61, (len(firsts), 90))
    for narrow in ({0: Window(9, 3), 2: Window(20, 1, (1, 2))}, {1: Window(5, 2, (0,))}):
        windows = Windows.of({attention[n]: w for n, w in narrow.items()})
        plan = compiled.adaskip.plan.with_windows(windows)
        cache, at = compiled.adaskip.new_cache(plan=plan), 0
        seen = {n: (w.sinks, w.tokens, w.full_heads) for n, w in narrow.items()}
        want = eager.logits(text, firsts, [seen] * text.shape[1])
        for count in (40, 1, 1, 8, 1, 17, 1, 20, 1):
            inputs: dict[str, Any] = {"input_ids": text[:, at : at + count].cuda()}
            if any(firsts):
                mask = (torch.arange(at + count) >= first).long()
                places = (torch.arange(at, at + count) - first).clamp_min(0)
                inputs.update(attention_mask=mask.cuda(), position_ids=places.cuda())
            with torch.no_grad():
                got = compiled(**inputs, past_key_values=cache).logits.float().cpu()
            real = torch.arange(at, at + count) >= first
            expected = want[:, at : at + count]
            error = (got - expected)[real].norm() / expected[real].norm()
            assert float(error) < TOLERANCES[dtype] * 3
            at += count
    runtime = runtime_of(compiled)
    assert runtime.why_no_static_cache is None


@pytest.mark.parametrize("window", [None, 9])
def test_distillation_goes_through_attention(window: int | None) -> None:
    """On a GPU prompts run on operators that have no gradients; training exchanges them."""
    config = {
        **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61},
    }
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**config, sliding_window=window)).cuda().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    fitter = Fitter(model, Letters(), TEXTS, max_length=LIMIT)
    plan = SkipPlan.of(fitter.runtime.sublayers, ["1.ffn"])
    plan = fitter.fit(plan, SurrogateSpec("diagonal"))
    one = [Sample(fitter.samples[0])]
    steps = DistillConfig(steps=10, learning_rate=5e-3, batch_size=1, eval_interval=5)
    _, seen = distill(fitter, plan, [one], one, steps)
    assert min(seen.losses.values()) < seen.losses[0]


@pytest.mark.parametrize(
    ("dtype", "rows", "full_heads", "most"),
    [
        (torch.bfloat16, 1, (), 0.75),
        (torch.bfloat16, 4, (0, 2), 0.9),
        (torch.float32, 2, (1,), 0.9),
    ],
    ids=["layers", "heads", "heads without a kernel of ours"],
)
def test_what_forgets_gives_the_same_logits(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    rows: int,
    full_heads: tuple[int, ...],
    most: float,
) -> None:
    """Blocks of memory have 2,048 tokens here; what is let go is never read again."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=61,
        max_position_embeddings=32768,
    )
    torch.manual_seed(3)
    model = LlamaForCausalLM(config).to(dtype).cuda().eval()
    compiled = build(model, None, backend="eager")
    attention = [s for s in compiled.adaskip.sublayers if s.kind == "attention"]
    windows = {
        attention[0]: Window(700, 4, full_heads),
        attention[2]: Window(64, 0, full_heads),
    }
    plan = compiled.adaskip.plan.with_windows(Windows.of(windows))
    ids = torch.randint(0, 61, (rows, 16000), device="cuda")
    found, held = [], []
    for forget in (False, True, True):
        with monkeypatch.context() as patch:
            if not forget:
                graphs = runtime_of(compiled).graphs
                patch.setattr(type(graphs), "retention", lambda self, plans: ())
            cache, logits = compiled.adaskip.new_cache(capacity=16040, plan=plan), []
            with torch.inference_mode():
                for part in torch.split(ids, [9000, 1, 1, 8, 3000, 1, 1, 3988], 1):
                    out = compiled(input_ids=part, past_key_values=cache, logits_to_keep=1)
                    logits.append(out.logits[:, -1].clone())
                drafts = ids[:, :17]
                logits.append(
                    compiled(input_ids=drafts, past_key_values=cache).logits[:, 3].clone()
                )
                cache.crop(-13)
                for token in range(40):
                    out = compiled(input_ids=ids[:, token : token + 1], past_key_values=cache)
                    logits.append(out.logits[:, -1].clone())
            torch.cuda.synchronize()
            found.append(torch.cat(logits))
            held.append(cache.nbytes)
            assert cache.lease.buffers.by_head == (forget and bool(full_heads))
            del cache
    for other in found[1:]:
        close = TOLERANCES[dtype]  # another distance between heads may choose another kernel
        torch.testing.assert_close(other, found[0], atol=close, rtol=close)
    assert held[1] == held[2] < most * held[0]
    assert runtime_of(compiled).why_no_static_cache is None
