"""Which model a profile was measured on.

A fingerprint covers what the statistics of a sublayer depend on, weights aside: the configuration,
and the shapes of what is in the layers. It does not cover how weights are stored (dtype,
quantization), adapters, the attention kernel, nor what the decoder's stream ends in: embeddings and
head may be resized or tied, and the head may be a classifier's.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from adaskip_fx.plans.fingerprint import Fingerprint
from adaskip_fx.utils.files import JSON, canonical_digest
from adaskip_fx.utils.parallel_internals import is_sharded
from adaskip_fx.utils.peft_layers import BASES, Adapters, is_adapter, is_plain, runs_adapters

__all__ = ["Fingerprint", "digests_of", "fingerprint", "is_of", "unusual_layers"]

# Left out of the fingerprint. Two loads of one architecture must agree whatever the dtype, the
# attention kernel, the folder it came from or the transformers version, and however it is used.
# fmt: off
_VOCABULARY = frozenset({"vocab_size", "tie_word_embeddings"})  # tokens may be added; the head tied
_NOT_ARCHITECTURE = _VOCABULARY | frozenset({
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

#: Of models whose weights are sharded, as they were at the first look, which all ranks take: a rank
#: that has to tell a model in a message asks nobody.
_of_sharded: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def fingerprint(model: Any) -> Fingerprint:
    """Return what identifies a transformers model: its configuration and its layers' shapes.

    Cheap for any size (at most 256 elements of a parameter are read) and free of side effects. Of a
    model that is sharded all ranks must take it once, which gathers no more than these elements.
    """
    return Fingerprint(
        digest=_digest(model),
        model_type=str(getattr(model.config, "model_type", "unknown")),
        parameters=_count(model, set()),
        weights=_weights_digest(model),
    )


def digests_of(model: Any) -> frozenset[str]:
    """Return the digests that fingerprints of a model have: this version's, and the earlier ones'.

    Earlier versions covered the vocabulary and every parameter's shape, then what is around the
    decoder as well.
    """
    config = _architecture(model.config.to_dict(), _NOT_ARCHITECTURE - _VOCABULARY)
    named = sorted(model.named_parameters(), key=lambda item: str(item[0]))
    shapes: list[JSON] = [[name, list(parameter.shape)] for name, parameter in named]
    all_of_it = canonical_digest({"config": config, "parameters": shapes})
    return frozenset({_digest(model), _digest(model, model), all_of_it})


def is_of(known: Fingerprint, model: Any) -> bool:
    """Return whether a fingerprint, maybe of an earlier version, is of a model's architecture."""
    return known.digest in digests_of(model)


def unusual_layers(model: Any) -> str:
    """Return what of a model's layers takes other time than plain weights do, as text.

    That is: layers of another class than torch's and transformers' own, weights that are stored in
    a class of tensors, and adapters that are on; each with how many there are.
    """
    found: Counter[str] = Counter()
    for module in model.modules():
        kind = type(module)
        if is_adapter(kind):
            found[f"{kind.__module__}.{kind.__qualname__}"] += runs_adapters(module)
        elif _widths(module) is not None:
            held = [type(p) for p in module._parameters.values() if p is not None]
            stored = {k.__name__ for k in held if hasattr(k, "__tensor_flatten__")}
            own = kind.__module__.partition(".")[0] not in ("torch", "transformers")
            if own or stored:
                found[" ".join((kind.__name__, *sorted(stored)))] += 1
    return ", ".join(f"{count} {name}" for name, count in sorted(found.items()) if count)


def _digest(model: Any, decoder: Any = None) -> str:
    """Return the digest of what a model's head stands on, which may be handed in."""
    decoder = decoder if decoder is not None else getattr(model, "base_model", model)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    shapes: list[JSON] = [[path, shape] for path, shape in sorted(_shapes(decoder, "", ends))]
    return canonical_digest({"config": _architecture(model.config.to_dict()), "layers": shapes})


def _architecture(
    config: Mapping[Any, Any], left_out: frozenset[str] = _NOT_ARCHITECTURE
) -> dict[str, JSON]:
    kept: dict[str, JSON] = {}
    for key, value in config.items():
        key = str(key)
        # "transformers": its version, and the options of its JavaScript port.
        volatile = key.startswith(("_", "transformers")) or key.endswith(_NOT_ARCHITECTURE_SUFFIXES)
        # None is left out too: a newer transformers adds options with that default.
        if volatile or key in left_out or value is None:
            continue
        kept[key] = _plain(value, left_out)
    rope = kept.get("rope_parameters")
    if isinstance(rope, dict) and _ROTATED in rope:  # where older versions say it a second time
        kept.pop(_ROTATED, None)
    return kept


def _plain(value: Any, left_out: frozenset[str]) -> JSON:
    if isinstance(value, Mapping):  # a nested configuration (text_config), or rope parameters
        return _architecture(value, left_out)
    if isinstance(value, list | tuple | set | frozenset):
        items = [_plain(item, left_out) for item in value]
        return sorted(items, key=str) if isinstance(value, set | frozenset) else items
    return value if isinstance(value, bool | int | float | str) else str(value)


def _shapes(module: Any, path: str, ends: list[Any]) -> Iterator[tuple[str, list[int]]]:
    """Give the path and shape of each parameter in a module that the layers are made of.

    A linear layer's is its widths, however its weights are stored.
    """
    if any(module is end for end in ends):
        return
    if is_adapter(type(module)):
        for name, child in module._modules.items():
            if name in BASES and child is not None:
                yield from _shapes(child, path, ends)
        return
    widths = _widths(module)
    if widths is not None:
        yield f"{path}.weight", widths
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield f"{path}.{name}", list(parameter.shape)
    for name, child in module._modules.items():
        if child is not None:
            yield from _shapes(child, f"{path}.{name}", ends)


def _widths(module: Any) -> list[int] | None:
    """Return the widths [out, in] of a linear layer of any library; None of any other module."""
    out, into = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return [out, into] if isinstance(out, int) and isinstance(into, int) else None


def _count(module: Any, seen: set[int]) -> int:
    """Return how many parameters a module has, those of adapters left out."""
    total = 0
    if not is_adapter(type(module)):
        own = [p for p in module._parameters.values() if p is not None and id(p) not in seen]
        seen.update(map(id, own))
        total = sum(parameter.numel() for parameter in own)
    children = module._modules.items()
    kept = (c for n, c in children if n in BASES or not is_adapter(type(module)))
    return total + sum(_count(child, seen) for child in kept if child is not None)


def _weights_digest(model: Any) -> str:
    sharded = {n: p for n, p in model.named_parameters() if is_sharded(p)}
    if not sharded:
        return _digest_of_values(model, {})
    known: str | None = _of_sharded.get(model)
    if known is None:
        from adaskip_fx.parallel.held_values import sampled_on_all_ranks  # needs torch

        values = sampled_on_all_ranks(sharded, _sampled)
        known = _of_sharded[model] = _digest_of_values(model, values)
    return known


def _sampled(tensor: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the indices of the elements of a tensor that are read."""
    count = min(tensor.numel(), _WEIGHT_SAMPLES)
    return np.linspace(0, tensor.numel() - 1, count).round().astype(np.int64)


def _digest_of_values(model: Any, sharded: Mapping[str, Any]) -> str:
    """Return the digest of a model's weights; the bits of those of `sharded` are given."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: str(item[0])):
        digest.update(name.encode())
        if name in sharded:
            digest.update(sharded[name].astype("<i4").tobytes())
            continue
        for stored in _stored(parameter):
            if stored.is_meta or not stored.numel():  # no storage: nothing to read
                continue
            sample = stored.detach().flatten()[_sampled(stored).tolist()].float().cpu().numpy()
            digest.update(sample.astype("<f4").tobytes())
    for name, value in sorted(Adapters.of(model).facts.items()):
        if is_plain(value):
            digest.update(f"{name} {value}".encode())
    return digest.hexdigest()[:16]


def _stored(tensor: Any) -> Iterator[Any]:
    """Give the plain tensors that a tensor of a class of its own is stored as, or the tensor."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for name in flatten()[0]:
        inner = getattr(tensor, name)
        if inner is not None:
            yield from _stored(inner)
