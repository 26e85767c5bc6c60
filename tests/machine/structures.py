"""The decoders that the machine drives: tiny, each compiled once in a process."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from adaskip_fx import SkipPlan
from adaskip_fx.api import build
from adaskip_fx.kv_cache.argument_names import cache_argument
from adaskip_fx.model.handle import runtime_of
from tests.machine import edits
from tests.machine.edits import Edit, Values
from tests.support.families.all import FAMILIES, tiny_config, tiny_model

_LORA = ("q_proj", "down_proj")


@dataclass(frozen=True)
class Structure:
    """A decoder, and how it is used.

    Attributes:
        family: of `FAMILIES`.
        sizes: settings besides those of the family.
        branch: path of a module of the last layer that adds a branch; its output is a tensor.
        linear: path of a linear module outside of it.
        captured: names of edits of the compiled model that `make test` has graphs captured for.
        keeps: how many logits are asked for: of all tokens (0), or of the last.
        rows: batch sizes of requests without padding.
        padded: whether rows of different lengths are generated together.
        turns: whether requests get further prompts in `make test`, which is one more graph.
        surroundings: names of `tests.machine.world.SURROUNDINGS` to call it in besides none.
        options: of each compiled model that is made of it.
        skips_in_decode: a sublayer that the plan leaves out of decode steps, which is `branch`.
        adapters: whether it has LoRA adapters.
        more: makes edits of its own, of the model.
    """

    family: str
    branch: str
    linear: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    captured: tuple[str, ...] = ()
    keeps: tuple[int, ...] = (1,)
    rows: tuple[int, ...] = (1,)
    padded: bool = False
    turns: bool = False
    surroundings: tuple[str, ...] = ("inference mode",)
    options: tuple[Mapping[str, Any], ...] = (MappingProxyType({}),)
    skips_in_decode: str | None = None
    adapters: bool = False
    more: Callable[[Any], tuple[Edit, ...]] = lambda model: ()

    def model(self) -> Any:
        """A new one."""
        sizes = {"num_hidden_layers": 2, "max_position_embeddings": 256, **self.sizes}
        made = tiny_model(tiny_config(self.family, **sizes))
        return edits.with_adapters(made, _LORA) if self.adapters else made

    def edits(self, model: Any) -> tuple[Edit, ...]:
        """All that may be done to it, in an order that is always the same."""
        layers = self.branch.rsplit(".", 2)[0]
        own = edits.adapters(_LORA) if self.adapters else ()
        # (what the plan leaves out must stay where the reference's hook is)
        modules = (
            *edits.exchanged(model, self.branch),
            edits.shorter(layers),
        )
        return (
            *own,
            *self.more(model),
            *edits.hooks(self.branch),
            *(() if self.skips_in_decode else modules),
            *edits.tensors(model, self.linear),
            *edits.only_on_the_original(self.linear),
            *edits.asked_of_config(),
            *edits.own_to_each(),
        )


def _llama(model: Any) -> tuple[Edit, ...]:
    return (
        edits.attribute("model.norm", "variance_epsilon", 1.0),
        edits.attribute("model.layers.1.self_attn", "scaling", 0.01),
        edits.attribute("model.layers.1.mlp", "act_fn", nn.ReLU()),
    )


_MLP = {"branch": "model.layers.1.mlp", "linear": "model.layers.1.self_attn.o_proj"}

STRUCTURES: Mapping[str, Structure] = MappingProxyType(
    {
        "llama": Structure(
            "llama",
            **_MLP,
            captured=("hook that halves",),
            turns=True,
            surroundings=("inference mode", "autocast"),
            more=_llama,
        ),
        "tied llama": Structure(
            "llama",
            **_MLP,
            sizes={"tie_word_embeddings": True},
            options=({}, {"static_cache": True}),
        ),
        "llama, adapters": Structure(
            "llama", **_MLP, captured=("set_adapter('b')",), adapters=True
        ),
        "gemma2": Structure(
            "gemma2",
            branch="model.layers.1.post_feedforward_layernorm",
            linear="model.layers.1.mlp.gate_proj",  # a norm behind it undoes a factor
            sizes={"final_logit_softcapping": 30.0, "attn_logit_softcapping": 20.0},
            captured=("config.final_logit_softcapping = 3.0",),
            more=lambda model: (edits.config("final_logit_softcapping", 3.0),),
        ),
        "mistral, window": Structure(
            "mistral, sliding window", **_MLP, padded=True, turns=True, more=_llama
        ),
        "qwen3, decode plan": Structure("qwen3", **_MLP, turns=True, skips_in_decode="1.ffn"),
        "mixtral": Structure(
            "mixtral",
            **_MLP,
            more=lambda model: (
                edits.config("output_router_logits", True, compiled="either", original="either"),
            ),
        ),
        "gpt_neox": Structure(
            "gpt_neox",
            branch="gpt_neox.layers.1.mlp",
            linear="gpt_neox.layers.1.attention.dense",
        ),
        "phi3": Structure("phi3", **_MLP, surroundings=("inference mode", "meta")),
        "granite": Structure(
            "granite",
            **_MLP,
            sizes={"logits_scaling": 8.0},
            captured=("config.logits_scaling = 2.0",),
            surroundings=("inference mode", "float64"),
            more=lambda model: (edits.config("logits_scaling", 2.0),),
        ),
        "mamba": Structure(
            "mamba",
            branch="backbone.layers.1.mixer",
            linear="backbone.layers.0.mixer.out_proj",
            more=lambda model: (
                edits.config("return_dict", False, compiled="either", original="either"),
            ),
        ),
        "hybrid": Structure(
            "lfm2",
            branch="model.layers.1.feed_forward",
            linear="model.layers.0.feed_forward.w2",
            sizes={"layer_types": ["conv", "full_attention"]},
            turns=True,
        ),
    }
)


class Phase:
    """Whether the eager reference is at a decode step, told by where the prompt ends."""

    def __init__(self) -> None:
        self.prompt_end: int | None = None
        self.decoding = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Phase:
        return self  # the reference's copies are at the same step

    def look(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A pre-hook of the whole model."""
        given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        ids = next(tokens for tokens in given if tokens is not None)
        cache = next((kwargs[n] for n in ("cache", "past_key_values") if n in kwargs), None)
        stored = cache.get_seq_length() if cache is not None else 0
        self.decoding = self.prompt_end is not None and stored + ids.shape[1] > self.prompt_end

    def leave_out(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """A hook of the branch that decode steps skip."""
        return torch.zeros_like(output) if self.decoding else output


class Side:
    """A compiled model, and the eager model that it must equal.

    Attributes:
        compiled: the compiled model.
        reference: an eager copy that shares all tensors, with all that was done to `compiled`.
        edits: in force on the compiled model, by name, with how to take them back.
        phase: of the reference, where the plan leaves something out.
    """

    def __init__(self, structure: Structure, model: Any, options: Mapping[str, Any]) -> None:
        self.phase = Phase()
        self.options = options
        self.compiled = build(model, None, backend="eager", **options)
        self.reference = shared(model)
        self.edits: dict[str, Edit] = {}
        if structure.skips_in_decode:
            runtime = runtime_of(self.compiled)
            runtime.plan = SkipPlan.of(
                runtime.sublayers, [], decode_extra=[structure.skips_in_decode]
            )
            self.reference.register_forward_pre_hook(self.phase.look, with_kwargs=True)
            branch = self.reference.get_submodule(structure.branch)
            branch.register_forward_hook(self.phase.leave_out)

    def __repr__(self) -> str:
        return f"<compiled with {dict(self.options)}>"

    @property
    def cache_argument(self) -> str:
        """What forward calls its cache."""
        return cache_argument(type(self.reference).forward)


class Pair:
    """An original, what was compiled of it, and what may be done to them."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.original = structure.model()
        self.edits = {e.name: e for e in structure.edits(self.original)}
        self.values = Values.of(self.original)
        self.sides = tuple(Side(structure, self.original, o) for o in structure.options)
        self.forward_arguments = frozenset(
            inspect.signature(type(self.original).forward).parameters
        )


_pairs: dict[str, Pair] = {}


def pair(name: str) -> Pair:
    """The one of a structure that all sequences of this process use."""
    if name not in _pairs:
        _pairs[name] = Pair(STRUCTURES[name])
    return _pairs[name]


def drop(name: str) -> None:
    """Forget it: what was done to it may not have been taken back."""
    _pairs.pop(name, None)


def shared(model: Any) -> Any:
    """A copy of a model with Python state of its own that shares all tensors."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


@functools.cache
def known(name: str) -> bool:
    """Whether the installed transformers has it."""
    return FAMILIES[STRUCTURES[name].family].known
