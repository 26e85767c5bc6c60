"""What an exported checkpoint is compared with: the eager model, hooked, and no code of ours."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from adaskip_fx.api import build
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from tests.support.branch_paths import branches
from tests.support.families.all import tiny_config

#: Without an epsilon in its norms scales fold exactly.
_CHANGES: Mapping[str, dict[str, Any]] = MappingProxyType({"llama": {"rms_norm_eps": 0.0}})
IDS = torch.arange(3, 23).unsqueeze(0)


def model_of(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    return _model_of(family, dtype, **changes)


@functools.cache
def _model_of(family: str, dtype: torch.dtype, **changes: Any) -> Any:
    config = tiny_config(family, **{**_CHANGES.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    torch.manual_seed(1)
    with torch.no_grad():  # so that every sublayer and every bias matters
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64).to(dtype) * 0.2)
    return model


def sublayers(family: str, model: Any) -> tuple[Sublayer, ...]:
    return tuple(map(Sublayer.parse, branches(family, model)))


@functools.cache
def _compiled(model: Any) -> Any:
    return build(model, None, backend="eager")


def compiled_once(model: Any, plan: SkipPlan, backend: str) -> Any:
    """Stands in for `build`: a model is compiled once in a process, plans are set on it."""
    fast = _compiled(model)
    fast.adaskip.plan = plan
    return fast


@torch.no_grad()
def without(family: str, model: Any, skipped: Iterable[str]) -> torch.Tensor:
    """The logits of an eager copy of a model whose branches `skipped` give zeros."""
    hooked, paths = copy.deepcopy(model), branches(family, model)
    for name in skipped:
        for path in paths[name]:
            hooked.get_submodule(path).register_forward_hook(_zeros)
    logits: torch.Tensor = hooked(input_ids=IDS, use_cache=False).logits
    return logits


def _zeros(module: Any, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


@torch.no_grad()
def loaded_logits(folder: Path, model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """What a checkpoint gives to somebody who knows transformers alone."""
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=model.dtype, attn_implementation=model.config._attn_implementation
    )
    logits: torch.Tensor = loaded.eval()(input_ids=ids, use_cache=False).logits
    return logits


def fewest_layers(runs: Sequence[Sublayer], fits: Callable[[Sublayer, Sublayer], bool]) -> int:
    """The smallest number of layers by trying: each run is alone in a layer, or with the next."""
    if not runs:
        return 0
    alone = 1 + fewest_layers(runs[1:], fits)
    if len(runs) > 1 and fits(runs[0], runs[1]):
        return min(alone, 1 + fewest_layers(runs[2:], fits))
    return alone
