"""A stock model class that follows a plan, without vLLM: what it builds, loads and refuses."""

from __future__ import annotations

import importlib
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from adaskip_fx.plans.fingerprint import Fingerprint
from adaskip_fx.plans.skip_plan import PlanError, SkipPlan, Sublayer
from adaskip_fx.plans.surrogates import Surrogates
from adaskip_fx.serving import planned_model
from adaskip_fx.serving.overrides import overrides
from adaskip_fx.serving.planned_model import decoder_layers, planned_class
from adaskip_fx.serving.vllm_plugin import PlannedEntry
from tests.support import engine_layers as L
from tests.support.surrogates import surrogate

LAYERS = 3
SUBLAYERS = tuple(Sublayer(i, k) for i in range(LAYERS) for k in ("attention", "ffn"))
SKIPPED = ["0.ffn", "1.attention"]
PLAN = SkipPlan.of(SUBLAYERS, SKIPPED, surrogates=Surrogates.scale({Sublayer(1, "attention"): 0.5}))


class Stock(nn.Module):
    """A model as an engine has one: its attention registers by name what keeps K/V."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.layers = nn.ModuleList(L.PairLayer() for _ in range(LAYERS))
        self.loaded: list[str] = []
        compilation = vllm_config.compilation_config
        for number, layer in enumerate(self.layers):
            compilation.static_forward_context[f"{number}.attn"] = layer.self_attn
            compilation.static_forward_context[f"{number}.experts"] = layer.mlp
            compilation.static_all_moe_layers.append(f"{number}.experts")

    def load_weights(self, weights: Any) -> set[str]:
        self.loaded = [name for name, _ in weights]
        return set(self.loaded)


def settings(plan: SkipPlan | None, tmp_path: Path, **model: Any) -> Any:
    """An engine's configuration."""
    config = LlamaConfig(num_hidden_layers=LAYERS, hidden_size=L.HIDDEN, num_attention_heads=2)
    if plan is not None:
        config.adaskip = overrides(plan, tmp_path)["adaskip"]
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config, dtype=torch.float32, **model),
        compilation_config=SimpleNamespace(static_forward_context={}, static_all_moe_layers=[]),
        lora_config=None,
    )


def built(plan: SkipPlan | None, tmp_path: Path) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = settings(plan, tmp_path)
    return planned_class(Stock)(vllm_config=config), config.compilation_config


def test_skipped_branches_compute_and_keep_nothing(tmp_path: Path) -> None:
    model, compilation = built(PLAN, tmp_path)
    stock, _ = built(None, tmp_path)
    x = torch.randn(4, L.HIDDEN)
    instead = {"0.ffn": lambda x: x, "1.attention": lambda x: 0.5 * x}
    wanted = L.textbook(list(stock.layers), x, instead)
    torch.testing.assert_close(L.run(list(model.layers), x).double(), wanted, rtol=1e-5, atol=1e-5)
    context = compilation.static_forward_context
    assert list(context) == ["0.attn", "1.experts", "2.attn", "2.experts"]
    assert compilation.static_all_moe_layers == ["1.experts", "2.experts"]


def test_without_a_plan_it_is_the_stock_model(tmp_path: Path) -> None:
    model, compilation = built(None, tmp_path)
    assert type(model).__name__ == "Stock"
    assert isinstance(model, Stock)
    assert [type(m) for m in model.modules()][1:] == [
        type(m) for m in Stock(vllm_config=settings(None, tmp_path)).modules()
    ][1:]
    assert len(compilation.static_forward_context) == 2 * LAYERS
    assert model.load_weights([("layers.0.mlp.weight", 0)]) == {"layers.0.mlp.weight"}


def test_weights_of_skipped_branches_are_not_loaded(tmp_path: Path) -> None:
    model, _ = built(PLAN, tmp_path)
    names = [
        f"model.layers.{i}.{part}.weight"
        for i in (0, 1, 10)
        for part in ("input_layernorm", "self_attn.q_proj", "mlp.up_proj")
    ]
    dead = ["0.mlp.up_proj", "1.input_layernorm", "1.self_attn.q_proj"]
    kept = [n for n in names if n not in [f"model.layers.{d}.weight" for d in dead]]
    assert model.load_weights([(n, torch.zeros(1)) for n in names]) == set(kept)
    assert model.loaded == kept


@pytest.mark.breaks
def test_weights_that_nobody_filtered_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned_model, "_alive", lambda weights, dead: weights)
    model, _ = built(PLAN, tmp_path)
    assert model.load_weights([("model.layers.0.mlp.weight", 0)])


def test_an_architecture_of_the_registry_is_asked_as_before() -> None:
    """And its class is made when it is wanted, once."""
    stock = SimpleNamespace(inspect_model_cls=lambda: "known", load_model_cls=lambda: Stock)
    entry = PlannedEntry(stock)
    assert entry.inspect_model_cls() == "known"
    assert entry.load_model_cls() is planned_class(Stock) is planned_class(planned_class(Stock))


def another(layers: int = LAYERS, **fingerprint: Any) -> SkipPlan:
    """A plan of another model."""
    sublayers = [Sublayer(i, k) for i in range(layers) for k in ("attention", "ffn")]
    found = Fingerprint("0" * 16, fingerprint["model_type"], 1, "") if fingerprint else None
    return SkipPlan.of(sublayers, ["0.ffn"]).with_fingerprint(found)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (another(4), r"has 8 sublayers, 0\.attention to 3\.ffn, but the model's 3 layers have"),
        (another(model_type="qwen3"), "the plan is for a qwen3 model, this one is llama"),
        (
            PLAN.with_surrogates(Surrogates({SUBLAYERS[1]: surrogate("linear", hidden=4)})),
            r"0\.ffn: its linear surrogate is 4 wide, and the model's stream 8; make a plan",
        ),
        (
            SkipPlan.of(SUBLAYERS, [s for s in SUBLAYERS if s.kind == "attention"]),
            "the plan skips all attention, and vLLM schedules requests by their K/V; keep one",
        ),
    ],
)
def test_a_plan_that_is_not_for_the_model(plan: SkipPlan, message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        built(plan, tmp_path)


def test_adapters_are_refused(tmp_path: Path) -> None:
    config = settings(PLAN, tmp_path)
    config.lora_config = object()
    with pytest.raises(PlanError, match="not served with LoRA adapters; merge them, or leave"):
        planned_class(Stock)(vllm_config=config)


class Gated(Stock):
    """A model whose layers are those of no layout."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for layer in self.layers:
            layer.gate = L.Body()


def test_an_unknown_layer_never_ignores_a_plan(tmp_path: Path) -> None:
    planned_class(Gated)(vllm_config=settings(None, tmp_path))
    with pytest.raises(PlanError, match="PairLayer: no plan can be served with this layer"):
        planned_class(Gated)(vllm_config=settings(PLAN, tmp_path))


def test_a_model_whose_layers_are_not_found() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Identity() for _ in range(2))
    with pytest.raises(PlanError, match=r"one list of 3 decoder layers .* layers \(2\)$"):
        decoder_layers(model, 3)
    model.more = nn.ModuleList(nn.Identity() for _ in range(2))
    with pytest.raises(PlanError, match=r"layers \(2\), more \(2\)$"):
        decoder_layers(model, 2)


def test_a_surrogate_in_parallel_branches_is_named(tmp_path: Path) -> None:
    class Parallel(Stock):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.layers = nn.ModuleList(L.ParallelLayer() for _ in range(LAYERS))

    with pytest.raises(PlanError, match=r"^1\.attention: a scale surrogate in a layer whose"):
        planned_class(Parallel)(vllm_config=settings(PLAN, tmp_path))


def test_registering_leaves_no_architecture_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """And doing it again, as vLLM may, changes nothing."""
    stock = {name: SimpleNamespace(load_model_cls=lambda: Stock) for name in ("One", "Two")}
    registry = SimpleNamespace(models=dict(stock))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    module, _, name = pyproject["project"]["entry-points"]["vllm.general_plugins"][
        "adaskip"
    ].partition(":")
    for _ in range(2):
        getattr(importlib.import_module(module), name)()
        assert registry.models == {name: PlannedEntry(entry) for name, entry in stock.items()}
    assert issubclass(registry.models["One"].load_model_cls(), planned_model.PlannedModel)
