"""The configuration of a model with packed layers, and with windows where it has words for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from adaskip_passes import UnsupportedError

from ..plans.sublayer import Kind
from ..plans.windows import Window
from .packing import PackedLayer

#: Names of lists with an entry for each layer, by the branch that an entry is about.
_LISTS: Mapping[str, Kind] = MappingProxyType(
    {"layer_types": "attention", "no_rope_layers": "attention", "mlp_layer_types": "ffn"}
)
#: Likewise of lists of layers' numbers, and of numbers of the first layers.
_NUMBERS: Mapping[str, Kind] = MappingProxyType({"mlp_only_layers": "ffn"})
_FIRST: Mapping[str, Kind] = MappingProxyType(
    {"first_k_dense_replace": "ffn", "max_window_layers": "attention"}
)
#: What transformers' `per_layer_config` calls a branch that is left out.
_SKIPPED: Mapping[Kind, str] = MappingProxyType({"attention": "attention", "ffn": "mlp"})
_FULL, _SLIDING = "full_attention", "sliding_attention"


def cut_configuration(
    config: Any,
    packed: Sequence[PackedLayer],
    windows: Mapping[int, Window],
    per_layer_config: bool,
) -> Any:
    """Return the configuration of the new model, of the class of `config`, which is left alone.

    Args:
        config: Of the model.
        packed: The new layers.
        windows: By layer of the model, what its attention sees.
        per_layer_config: Whether it names the branches that add nothing (``"skip"``).

    Raises:
        UnsupportedError: It has no words for a window, or cannot be cut to so many layers.
    """
    data: dict[str, Any] = config.to_dict()
    before = config.num_hidden_layers
    count = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    data[count] = len(packed)
    for name, kind in _LISTS.items():
        if isinstance(data.get(name), list) and len(data[name]) == before:
            data[name] = [data[name][layer.template(kind)] for layer in packed]
    for name, kind in _NUMBERS.items():
        if isinstance(data.get(name), list):
            listed = set(data[name])
            data[name] = [i for i, layer in enumerate(packed) if layer.template(kind) in listed]
    for name, kind in _FIRST.items():
        if isinstance(data.get(name), int):
            data[name] = sum(layer.template(kind) < data[name] for layer in packed)
    if windows:
        _write_windows(data, packed, windows, type(config).__name__)
    if per_layer_config:
        skipped = {str(i): _skipped(layer) for i, layer in enumerate(packed)}
        data["per_layer_config"] = {i: {"skip": names} for i, names in skipped.items() if names}
    try:
        return type(config).from_dict(data)
    except (TypeError, ValueError) as error:
        raise UnsupportedError(
            f"a {type(config).__name__} cannot be cut to {len(packed)} layers ({error}); run the "
            "plan with adaskip_fx.compile"
        ) from error


def _skipped(layer: PackedLayer) -> list[str]:
    return [name for kind, name in _SKIPPED.items() if layer.source(kind) is None]


def _write_windows(
    data: dict[str, Any], packed: Sequence[PackedLayer], windows: Mapping[int, Window], name: str
) -> None:
    """Say in a configuration which attention sees how many tokens.

    The new layers' attention that runs has the windows of the model's own layers.
    """
    runs = {i: layer.attention for i, layer in enumerate(packed) if layer.attention is not None}
    wanted = {i: windows[source].tokens for i, source in runs.items() if source in windows}
    own = data.get("sliding_window")
    types = data.get("layer_types")
    if "sliding_window" not in data:
        raise _no_words(windows, f"a {name} has no sliding_window")
    if types is None:
        sizes = {min(wanted[i], own or wanted[i]) if i in wanted else own for i in runs}
    else:
        odd = [types[i] for i in wanted if types[i] not in (_FULL, _SLIDING)]
        if odd:
            raise _no_words(windows, f"it is of attention of type {odd[0]}")
        slides = [i for i in runs if i in wanted or types[i] == _SLIDING]
        sizes = {_tokens(wanted.get(i), own if types[i] == _SLIDING else None) for i in slides}
    if len(sizes) != 1:
        told = ", ".join("all" if s is None else str(s) for s in sorted(sizes, key=str))
        raise _no_words(windows, f"a {name} has one window for all, here they are {told} tokens")
    (data["sliding_window"],) = sizes
    if types is not None:
        data["layer_types"] = [_SLIDING if i in wanted else kind for i, kind in enumerate(types)]
    if "use_sliding_window" in data:
        data["use_sliding_window"] = True


def _tokens(wanted: int | None, own: int | None) -> int | None:
    """Return how many tokens are seen of those that a plan and the model's own mask show."""
    known = [size for size in (wanted, own) if size is not None]
    return min(known, default=None)


def _no_words(windows: Mapping[int, Window], reason: str) -> UnsupportedError:
    layer, window = next(iter(windows.items()))
    return UnsupportedError(
        f"{layer}.attention: {window} cannot be said in a plain checkpoint, because {reason}; run "
        "the plan with adaskip_fx.compile, or export it without windows "
        "(plan.with_windows(NO_WINDOWS))"
    )
