"""Which model a profile was measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaskip_fx.utils.files import JSON, canonical_digest

# Left out of the fingerprint. Two loads of one architecture must agree whatever the dtype, the
# attention kernel, the folder it came from or the transformers version, and however it is used.
# fmt: off
_NOT_ARCHITECTURE = frozenset({
    "name_or_path", "architectures", "auto_map", "tokenizer_class",
    "dtype", "torch_dtype", "attn_implementation", "quantization_config", "torchscript",
    "use_cache", "return_dict", "use_return_dict", "chunk_size_feed_forward",
    "output_attentions", "output_hidden_states", "output_router_logits", "output_scores",
    # Training: how weights were initialized and regularized.
    "initializer_range", "dropout", "finetuning_task", "task_specific_params",
    # Labels of a classification head; its size is among the parameters.
    "id2label", "label2id", "num_labels", "problem_type",
})
# fmt: on
_NOT_ARCHITECTURE_SUFFIXES = ("_token_id", "_token_ids", "_dropout", "_pdrop")
_ROTATED = "partial_rotary_factor"
_WEIGHT_SAMPLES = 256


@dataclass(frozen=True)
class Fingerprint:
    """Which model was measured.

    Attributes:
        digest: 16 hex characters of the architecture; equal for every dtype and set of weights.
        model_type: the configuration's name for the architecture, for messages.
        parameters: number of weights.
        weights: 16 hex characters of a sample of the weights; information only, never compared (it
            changes with the dtype).
    """

    digest: str
    model_type: str
    parameters: int
    weights: str

    def __str__(self) -> str:
        return f"{self.digest} ({self.model_type}, {self.parameters:,} parameters)"


def fingerprint(model: Any) -> Fingerprint:
    """Return what identifies a transformers model: its configuration and its parameters' shapes.

    Cheap for any size (at most 256 elements of a parameter are read) and free of side effects.
    """
    named = sorted(model.named_parameters(), key=lambda item: item[0])
    shapes: list[JSON] = [[name, list(parameter.shape)] for name, parameter in named]
    config = _architecture(model.config.to_dict())
    return Fingerprint(
        digest=canonical_digest({"config": config, "parameters": shapes}),
        model_type=str(getattr(model.config, "model_type", "unknown")),
        parameters=sum(parameter.numel() for _, parameter in named),
        weights=_weights_digest(named),
    )


def _architecture(config: Mapping[Any, Any]) -> dict[str, JSON]:
    kept: dict[str, JSON] = {}
    for key, value in config.items():
        key = str(key)
        # "transformers": its version, and the options of its JavaScript port.
        volatile = key.startswith(("_", "transformers")) or key.endswith(_NOT_ARCHITECTURE_SUFFIXES)
        # None is left out too: a newer transformers adds options with that default.
        if volatile or key in _NOT_ARCHITECTURE or value is None:
            continue
        kept[key] = _plain(value)
    rope = kept.get("rope_parameters")
    if isinstance(rope, dict) and _ROTATED in rope:  # where older versions say it a second time
        kept.pop(_ROTATED, None)
    return kept


def _plain(value: Any) -> JSON:
    if isinstance(value, Mapping):  # a nested configuration (text_config), or rope parameters
        return _architecture(value)
    if isinstance(value, list | tuple | set | frozenset):
        items = [_plain(item) for item in value]
        return sorted(items, key=str) if isinstance(value, set | frozenset) else items
    return value if isinstance(value, bool | int | float | str) else str(value)


def _weights_digest(named: list[tuple[str, Any]]) -> str:
    digest = hashlib.sha256()
    for name, parameter in named:
        digest.update(name.encode())
        if parameter.is_meta or not parameter.numel():  # no storage: nothing to read
            continue
        count = min(parameter.numel(), _WEIGHT_SAMPLES)
        indices = np.linspace(0, parameter.numel() - 1, count).round().astype(np.int64).tolist()
        sample = parameter.detach().flatten()[indices].float().cpu().numpy()
        digest.update(sample.astype("<f4").tobytes())
    return digest.hexdigest()[:16]
