"""Tiny models of random weights, saved as a checkpoint: one of each family that is tested."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

LAYERS, VOCABULARY = 4, 256
# vLLM's attention on a CPU wants heads of 32.
_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: family -> classes in transformers, by the beginning of their name, and what its config says more
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", {}),
    "short": ("Llama", {"num_hidden_layers": 2}),  # to be compiled
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma2": ("Gemma2", {"head_dim": 32, "sliding_window": 16}),
    "granite": ("Granite", {"residual_multiplier": 0.22}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "cohere": ("Cohere", {}),
    "olmo2": ("Olmo2", {}),  # vLLM runs it by its transformers backend
}


def make(family: str) -> Any:
    """A model of a family; its norms are no identity."""
    name, more = FAMILIES[family]
    torch.manual_seed(len(family))
    config = getattr(transformers, f"{name}Config")(**{**_COMMON, **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, parameter in model.named_parameters():
        if "norm" in key:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


class Folders:
    """Where the models are saved, each when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __getitem__(self, family: str) -> Path:
        folder = self._root / family
        if not folder.exists():
            make(family).save_pretrained(folder)
            _tokenizer().save_pretrained(folder)
        return folder

    def reference(self, family: str) -> Any:
        """The saved model in eager transformers. Before vLLM has seen the family: its transformers
        backend changes transformers' own classes."""
        return transformers.AutoModelForCausalLM.from_pretrained(
            self[family], dtype=torch.float32, attn_implementation="eager"
        ).eval()


def _tokenizer() -> Any:
    """Words ``t0`` to ``t255``, one a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="t0", pad_token="t0", bos_token="t1", eos_token="t2"
    )
