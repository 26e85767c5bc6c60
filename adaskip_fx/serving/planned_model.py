"""A stock model class of vLLM that follows the plan in its configuration."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaskip_fx.plans.actions import PlanError
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.serving.layer_proof import proven_layout, skip
from adaskip_fx.serving.overrides import plan_of

if TYPE_CHECKING:
    _Model = nn.Module
else:
    _Model = object  # the stock class comes behind the mixin

_LOGGER = logging.getLogger(__name__)
_TRANSFORMERS = "vllm.model_executor.models.transformers"
_MISSING = "PPMissingLayer"  #: what vLLM puts where another rank has the layer
#: what bodies are called in most checkpoints, whatever the engine calls them
_CHECKPOINT = {"attention": "self_attn", "ffn": "mlp"}


class PlannedModel(_Model):
    """Mixin in front of a stock model class: with a plan, some of its branches are left out.

    The stock class builds the model, then modules of skipped branches are replaced and what they
    registered with the engine (K/V cache, experts) is withdrawn, so their K/V takes no memory.
    Without a plan nothing differs from the stock class.

    Raises:
        PlanError: The plan is not for this model, or this model cannot follow it.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        plan = plan_of(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self._dead_weights: tuple[str, ...] = ()
        if plan is not None:
            self._dead_weights = _follow(self, plan, vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load a checkpoint's weights, but for those of branches that are left out."""
        dead = self._dead_weights
        stock: Any = super()
        return stock.load_weights(_alive(weights, dead) if dead else weights)


@functools.cache
def planned_class(stock: type[nn.Module]) -> type[nn.Module]:
    """Return the class, of the same name, of such models as `stock` that follow a plan."""
    if issubclass(stock, PlannedModel):
        return stock
    return type(stock.__name__, (PlannedModel, stock), {"__module__": stock.__module__})


def _alive(
    weights: Iterable[tuple[str, torch.Tensor]], dead: tuple[str, ...]
) -> Iterator[tuple[str, torch.Tensor]]:
    return ((n, w) for n, w in weights if not any(f".{d}." in f".{n}" for d in dead))


def _follow(model: nn.Module, plan: SkipPlan, vllm_config: Any) -> tuple[str, ...]:
    """Rewrite a model in place, and return the paths of modules whose weights are not wanted.

    These begin at the list of layers: ``layers.3.mlp``.
    """
    config = vllm_config.model_config.hf_config.get_text_config()
    _check_served(plan, config, vllm_config)
    name, layers = decoder_layers(model, config.num_hidden_layers)
    as_tuple = any(c.__module__.startswith(_TRANSFORMERS) for c in type(model).__mro__)
    dtype = vllm_config.model_config.dtype
    dead: list[str] = []
    for number, layer in enumerate(layers):
        mine = [s for s in plan.skipped("prefill") if s.layer == number]
        window = plan.window("prefill", Sublayer(number, "attention"))
        if type(layer).__name__ == _MISSING or not (mine or window):
            continue
        layout = proven_layout(layer, config.hidden_size, as_tuple=as_tuple)
        for sublayer in mine:
            _withdraw(getattr(layer, layout.body(sublayer.kind)), vllm_config.compilation_config)
            found = plan.surrogates.get(sublayer)
            try:
                skip(layer, layout, sublayer.kind, found, as_tuple=as_tuple, dtype=dtype)
            except PlanError as error:
                raise PlanError(f"{sublayer}: {error}") from error
            parts = (*layout.chain(sublayer.kind), _CHECKPOINT[sublayer.kind])
            dead += [f"{name}.{number}.{part}" for part in parts]
        if window is not None:
            from adaskip_fx.serving.vllm_windows import set_window  # needs vLLM

            set_window(getattr(layer, layout.body("attention")), window, vllm_config, number)
    _LOGGER.info("%s", plan)
    return tuple(dead)


def _check_served(plan: SkipPlan, config: Any, vllm_config: Any) -> None:
    """Refuse a plan of another model, and what has not been tried together with a plan."""
    layers = range(config.num_hidden_layers)
    expected = {Sublayer(i, kind) for i in layers for kind in ("attention", "ffn")}
    if set(plan.sublayers) != expected:
        raise PlanError(
            f"the plan has {len(plan.sublayers)} sublayers, {plan.sublayers[0]} to "
            f"{plan.sublayers[-1]}, but the model's {len(layers)} layers have attention and an ffn "
            "each: the plan is of another model, or the model has mixers, which are not served"
        )
    fingerprint = plan.fingerprint
    types = {config.model_type, vllm_config.model_config.hf_config.model_type}
    if fingerprint is not None and fingerprint.model_type not in types:
        raise PlanError(
            f"the plan is for a {fingerprint.model_type} model, this one is {config.model_type}; "
            "make a plan for this model"
        )
    for sublayer, surrogate in plan.surrogates.by_sublayer.items():
        if surrogate.width not in (None, config.hidden_size):
            raise PlanError(
                f"{sublayer}: its {surrogate.kind} surrogate is {surrogate.width} wide, and the "
                f"model's stream {config.hidden_size}; make a plan for this model"
            )
    if all(s in plan.prefill for s in plan.sublayers if s.kind == "attention"):
        raise PlanError(
            "the plan skips all attention, and vLLM schedules requests by their K/V; keep one"
        )
    if vllm_config.lora_config is not None:
        raise PlanError("a plan is not served with LoRA adapters; merge them, or leave one out")


def decoder_layers(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """Return the list of a model's decoder layers, and what it is called in its parent.

    Raises:
        PlanError: There is no list of so many modules, or more than one.
    """
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    found = [(name, m) for name, m in lists if len(m) == count]
    if len(found) != 1:
        named = ", ".join(f"{name} ({len(m)})" for name, m in lists) or "none"
        raise PlanError(
            f"{type(model).__name__}: no plan can be served: one list of {count} decoder layers is "
            f"wanted, and its lists are: {named}"
        )
    path, layers = found[0]
    return path.rpartition(".")[2], layers


def _withdraw(body: nn.Module, compilation: Any) -> None:
    """Take a branch's modules out of the engine's books; K/V caches are made from these."""
    mine = set(map(id, body.modules()))
    context = compilation.static_forward_context
    for name in [n for n, module in context.items() if id(module) in mine]:
        del context[name]
        if name in compilation.static_all_moe_layers:
            compilation.static_all_moe_layers.remove(name)
