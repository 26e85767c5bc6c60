"""Which modules of a decoder layer are one residual branch: a table, by the names they have.

A row names the modules of the attention's branch and of the FFN's in the order in which the stream
runs through them, norms among them. Whether the layer carries the stream as one tensor or as a pair
is not in the table: stand-ins answer both, and `layer_proof` runs the rewritten layer, so a row
that does not describe a layer is found out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from adaskip_fx.plans.sublayer import Kind

Chain = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """One way to build a decoder layer.

    Attributes:
        name: What to call it in messages.
        attention: The modules of the attention's branch, in order.
        ffn: Likewise of the FFN.
        bodies: Of those modules, the two that are no norms.
        others: Modules that may be there besides, and are none of both branches.
        multiplier: The layer's attribute that a branch is multiplied with before it is added.
        parallel: Whether both branches read one norm, which then is in `others`: a skipped branch
            can only add nothing, since its body does not see the stream.
    """

    name: str
    attention: Chain
    ffn: Chain
    bodies: tuple[str, str] = ("self_attn", "mlp")
    others: Chain = ()
    multiplier: str | None = None
    parallel: bool = False

    def chain(self, kind: Kind) -> Chain:
        """Return the modules of the branch of attention or FFN, in order."""
        return self.attention if kind == "attention" else self.ffn

    def body(self, kind: Kind) -> str:
        """Return the module of a branch that is no norm."""
        return self.bodies[0] if kind == "attention" else self.bodies[1]

    def fits(self, layer: nn.Module) -> bool:
        """Return whether a layer has exactly these modules, and the multiplier if there is one."""
        children = {n for n, child in layer.named_children() if any(True for _ in _held(child))}
        wanted = {*self.attention, *self.ffn, *self.others}
        return children == wanted and (self.multiplier is None) != hasattr(
            layer, self.multiplier or "residual_multiplier"
        )


def _held(module: nn.Module) -> list[object]:
    """Return the tensors of a module; what has none (dropout) takes no part."""
    return [*module.parameters(), *module.buffers()]


_ATTENTION = ("input_layernorm", "self_attn")
_FFN = ("post_attention_layernorm", "mlp")

#: The layouts that are known. Names of families say where each was found; any layer is looked up.
# fmt: off
LAYOUTS: tuple[Layout, ...] = (
    Layout("Llama", _ATTENTION, _FFN),  # Qwen 2 and 3, Mistral, Gemma, OLMoE, Nemotron, StableLM
    Layout("Granite", _ATTENTION, _FFN, multiplier="residual_multiplier"),
    Layout("Mixtral", _ATTENTION, ("post_attention_layernorm", "block_sparse_moe"),
           ("self_attn", "block_sparse_moe")),  # PhiMoE
    Layout("GPT-OSS", ("input_layernorm", "attn"), _FFN, ("attn", "mlp")),
    Layout("EXAONE", ("ln_1", "attn"), ("ln_2", "mlp"), ("attn", "mlp")),  # GPT-2
    Layout("InternLM 2", ("attention_norm", "attention"), ("ffn_norm", "feed_forward"),
           ("attention", "feed_forward")),
    Layout("Apertus", ("attention_layernorm", "self_attn"), ("feedforward_layernorm", "mlp")),
    Layout("Gemma 2", (*_ATTENTION, "post_attention_layernorm"),  # Gemma 3
           ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm")),
    Layout("GLM 4", (*_ATTENTION, "post_self_attn_layernorm"),
           (*_FFN, "post_mlp_layernorm")),
    Layout("OLMo 2", ("self_attn", "post_attention_layernorm"),  # EXAONE 4
           ("mlp", "post_feedforward_layernorm")),
    Layout("Cohere", ("self_attn",), ("mlp",), others=("input_layernorm",), parallel=True),  # Phi
    Layout("GPT-NeoX, parallel", ("attention",), ("mlp",), ("attention", "mlp"),
           ("input_layernorm", "post_attention_layernorm"), parallel=True),
    Layout("GPT-NeoX", ("input_layernorm", "attention"), _FFN, ("attention", "mlp")),
)
# fmt: on


def layouts_of(layer: nn.Module) -> tuple[Layout, ...]:
    """Return the layouts whose modules a decoder layer has."""
    return tuple(layout for layout in LAYOUTS if layout.fits(layer))


def module_names(layer: nn.Module) -> str:
    """Return the names of a layer's modules that hold something, for a message."""
    return ", ".join(name for name, child in layer.named_children() if _held(child))


KNOWN: Mapping[str, Layout] = {layout.name: layout for layout in LAYOUTS}
