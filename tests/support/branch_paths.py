"""Where the branches of each family's layers are, as data: what the eager reference hooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Branches:
    """Paths in a model.

    Attributes:
        layers: of the list of decoder layers.
        attention, ffn, mixer: in a layer, of the modules that are its branches, if it has them;
            several, separated by spaces, are added to each other first.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    ffn: str = "mlp"
    mixer: str = ""

    def of(self, model: Any) -> dict[str, tuple[str, ...]]:
        """For each sublayer of a model the modules that its branch comes out of."""
        found = {}
        for i, layer in enumerate(model.get_submodule(self.layers)):
            own = {name for name, _ in layer.named_modules()}
            for kind in ("mixer", "attention", "ffn"):
                names = [n for n in getattr(self, kind).split() if n in own]
                if names:
                    found[f"{i}.{kind}"] = tuple(f"{self.layers}.{i}.{n}" for n in names)
        return found


_FALCON = Branches("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h")
_NEOX = Branches("gpt_neox.layers", "attention")
_GPT2 = Branches("transformer.h", "attn")
_FEED_FORWARD = Branches(ffn="feed_forward")
_MAMBA = Branches("backbone.layers", mixer="mixer")

#: Those that are not as in Llama.
OTHERWISE: Mapping[str, Branches] = MappingProxyType(
    {
        "opt": Branches("model.decoder.layers", ffn="fc2"),
        "gpt2": _GPT2,
        "gpt_bigcode": _GPT2,
        "gpt_neo": _GPT2,
        "gptj": _GPT2,
        "codegen": _GPT2,
        "gpt_neox": _NEOX,
        "gpt_neox, sequential": _NEOX,
        "bloom": _FALCON,
        "falcon, new decoder": _FALCON,
        "falcon, parallel": _FALCON,
        "falcon, sequential": _FALCON,
        "falcon, alibi": _FALCON,
        "mpt": Branches("transformer.blocks", "attn.out_proj", "ffn.down_proj"),
        "xglm": Branches(ffn="fc2"),
        "biogpt": Branches("biogpt.layers", ffn="fc2"),
        "granitemoe": Branches(ffn="block_sparse_moe"),
        "granitemoeshared": Branches(ffn="block_sparse_moe shared_mlp"),
        "granitemoehybrid": Branches(ffn="block_sparse_moe shared_mlp", mixer="mamba"),
        "llama4": _FEED_FORWARD,
        "jetmoe": Branches(attention="self_attention"),
        "mamba": _MAMBA,
        "falcon_mamba": _MAMBA,
        "mamba2": _MAMBA,
        "bamba": Branches(ffn="feed_forward", mixer="mamba"),
        "jamba": Branches(ffn="feed_forward", mixer="mamba"),
        "falcon_h1": Branches(ffn="feed_forward", mixer="mamba"),
        "nemotron_h": Branches(attention="mixer"),
        "zamba2": Branches(attention="mamba_decoder.mamba", mixer="mamba"),
        "qwen3_next": Branches(mixer="linear_attn"),
        "qwen3_5": Branches(mixer="linear_attn"),
        "olmo_hybrid": Branches(mixer="linear_attn"),
        "lfm2": Branches(ffn="feed_forward", mixer="conv"),
        "lfm2_moe": Branches(ffn="feed_forward", mixer="conv"),
    }
)


#: Those whose modules do not say what they are: kinds, layer by layer.
KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "nemotron_h": ("mixer", "attention", "ffn", "mixer"),
        "kimi_linear": ("mixer ffn", "attention ffn", "mixer ffn"),
    }
)


def branches(family: str, model: Any) -> dict[str, tuple[str, ...]]:
    """For each sublayer of a family's tiny model the modules that its branch comes out of."""
    found = OTHERWISE.get(family, Branches()).of(model)
    if family in KINDS:
        names = [f"{i}.{kind}" for i, kinds in enumerate(KINDS[family]) for kind in kinds.split()]
        return dict(zip(names, found.values(), strict=True))
    return found
