"""Which tensors of a decoder layer belong to which branch, and which of them end it.

The table goes by the names that transformers gives to parts of a layer. Whether it is right for a
model is not believed: what is exported is compared with the compiled model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from adaskip_passes import UnsupportedError

from ..plans.sublayer import Kind

# fmt: off
_ATTENTION = frozenset({
    "self_attn", "attn", "attention", "self_attention",
    "input_layernorm", "ln_1", "norm_1", "self_attn_layer_norm", "attention_layernorm", "ln_attn",
    "post_self_attn_layernorm",
})
_FFN = frozenset({
    "mlp", "ffn", "feed_forward", "block_sparse_moe", "shared_mlp", "fc1", "fc2",
    "ln_2", "norm_2", "final_layer_norm", "feedforward_layernorm", "ln_mlp",
    "pre_feedforward_layernorm", "post_feedforward_layernorm", "post_mlp_layernorm",
})
#: Norms in front of an FFN of their own: a layer without any has its branches in parallel.
_BEFORE_FFN = frozenset({
    "post_attention_layernorm", "ln_2", "norm_2", "final_layer_norm", "feedforward_layernorm",
    "pre_feedforward_layernorm", "post_feedforward_layernorm",
})
#: Norms behind a branch, which undo that its weights are multiplied.
_BEHIND = frozenset({
    "post_feedforward_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm",
})
#: Of a branch, what it ends in: with zeros there it adds nothing.
_ENDS = frozenset({
    "o_proj", "out_proj", "dense", "c_proj", "down_proj", "down_proj_bias", "fc2", "fc_out",
    "dense_4h_to_h", "output_linear",
})
# fmt: on
_BOTH = "post_attention_layernorm"  # in front of the FFN; behind attention where others are there
_PARALLEL = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")


@dataclass(frozen=True)
class Layout:
    """What the decoder layers of a model are made of.

    Attributes:
        layers: The path of their list in the model.
        parts: The names of a layer's parts.
        parallel: Whether attention and FFN of a layer read the same stream.
    """

    layers: str
    parts: frozenset[str]
    parallel: bool

    @property
    def norm_behind(self) -> str | None:
        """A norm behind a branch, if there is one."""
        behind = sorted(self.parts & _BEHIND)
        return behind[0] if behind else None

    def owner(self, name: str) -> Kind:
        """Return the branch that a tensor belongs to, by its path in the layer."""
        part = name.partition(".")[0]
        if part == _BOTH:
            return "attention" if self.parts & _BEHIND_ATTENTION else "ffn"
        return "attention" if part in _ATTENTION else "ffn"


_BEHIND_ATTENTION = frozenset({"pre_feedforward_layernorm", "post_feedforward_layernorm"})


def ends_branch(name: str) -> bool:
    """Return whether a tensor of a layer, by its path there, is of what its branch ends in."""
    return not _ENDS.isdisjoint(name.split("."))


def layout_of(model: Any) -> Layout:
    """Return the layout of a decoder's layers.

    Raises:
        UnsupportedError: They are not in one list, or a part of them has a name that is not known.
    """
    count = model.config.num_hidden_layers
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and _is_decoder(module)
    ]
    if len(lists) != 1:
        raise UnsupportedError(
            f"{type(model).__name__} has no one list of {count} decoder layers, so its plan does "
            "not become a plain checkpoint: run it with adaskip_fx.compile"
        )
    path, layers = lists[0]
    parts = frozenset(name for layer in layers for name, _ in layer.named_children())
    held = {name.partition(".")[0] for layer in layers for name in layer.state_dict()}
    unknown = sorted(held - _ATTENTION - _FFN - {_BOTH})
    if unknown:
        raise UnsupportedError(
            f"{path}: a {type(layers[0]).__name__} has {unknown[0]!r}, which is not known to be "
            "of attention or FFN, so its plan does not become a plain checkpoint: run it with "
            "adaskip_fx.compile"
        )
    parallel = not parts & _BEFORE_FFN or any(getattr(model.config, n, False) for n in _PARALLEL)
    return Layout(path, parts, parallel)


def _is_decoder(layers: nn.ModuleList) -> bool:
    names = {name for layer in layers for name, _ in layer.named_children()}
    return bool(names & _ATTENTION) and bool(names & _FFN)
