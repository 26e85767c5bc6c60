"""What the first captured graph says of a model: its sublayers, and which can be skipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import fx

from adaskip_passes import UnsupportedError
from adaskip_passes.analysis.position_tables import reads_position_table
from adaskip_passes.partition.outer import Piece, piece_of, sublayer_calls
from adaskip_passes.windows.find_attention import Attention, attention_of

from ..capture.phase_graph import CapturedPhase, Memory
from ..kv_cache.layer_spec import LayerCacheSpec
from ..kv_cache.retention import Retained, Retention, retention, together
from ..parallel.shards import HeadShare
from ..plans.skip_plan import Action, SkipPlan
from ..plans.sublayer import Sublayer
from ..plans.windows import Window

_OF_A_STEP = "L['cache']", "L['inputs']"
_ALL = HeadShare(0, 1)
_TOKENS = "L['inputs']['input_ids']", "L['inputs']['inputs_embeds']"


class ModelStructure:
    """The sublayers of a model; they are the same in all of its graphs."""

    def __init__(
        self,
        captured: CapturedPhase,
        own_attention: bool = False,
        shares: Mapping[int, HeadShare] | None = None,
    ) -> None:
        """Read the structure from any captured graph of the model.

        Args:
            captured: The graph.
            own_attention: Whether attention is a function that a user registered.
            shares: Which K/V heads of a layer are on this rank, by layer; None: all of all.
        """
        self._shares = shares
        self._captured = captured
        self._own_attention = own_attention

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """All sublayers, in stream order."""
        return self._captured.sublayers

    @cached_property
    def width(self) -> int:
        """The width H of the residual stream."""
        first = sublayer_calls(self._captured.outer.graph)[0].args[0]
        assert isinstance(first, fx.Node)
        return int(first.meta["example_value"].shape[-1])

    @cached_property
    def has_position_table(self) -> bool:
        """Whether the model looks something up by position, so that its positions have an end."""
        captured = self._captured.capture
        places = captured.graph.graph.find_nodes(op="placeholder")
        source = dict(zip(places, captured.sources, strict=True))
        weights = [n for n, s in source.items() if not s.startswith(_OF_A_STEP)]
        tokens = [n for n, s in source.items() if s.startswith(_TOKENS)]
        return reads_position_table(captured.graph.graph, weights, tokens)

    @cached_property
    def weights(self) -> dict[Sublayer | None, tuple[torch.Tensor, ...]]:
        """For each sublayer the (fake) parameters and buffers that it takes.

        Under None are those of what comes after all sublayers: the last norm and the head.
        """
        captured = self._captured
        places = captured.capture.graph.graph.find_nodes(op="placeholder")
        pairs = zip(places, captured.capture.sources, strict=True)
        fixed = {node.name for node, source in pairs if not source.startswith(_OF_A_STEP)}
        calls = sublayer_calls(captured.outer.graph)
        last = captured.outer.graph.output_node().all_input_nodes
        ends = [n for call in last for n in call.all_input_nodes if call not in calls.values()]
        given: dict[Sublayer | None, list[fx.Node]] = {None: ends}
        given |= {s: calls[i].all_input_nodes for i, s in enumerate(captured.sublayers)}
        return {
            owner: tuple(
                node.meta["example_value"]
                for node in nodes
                if node.name in fixed and isinstance(node.meta["example_value"], torch.Tensor)
            )
            for owner, nodes in given.items()
        }

    @cached_property
    def modules(self) -> dict[str, tuple[str, ...]]:
        """For each sublayer the modules whose outputs are its branch, in stream order."""
        captured = self._captured
        return {
            str(s): paths for s, paths in zip(captured.sublayers, captured.modules, strict=True)
        }

    @cached_property
    def memory(self) -> dict[Sublayer, frozenset[Memory]]:
        """For each sublayer what it uses of the cache."""
        return dict(zip(self.sublayers, self._captured.memory, strict=True))

    def stored(self, plan: SkipPlan, specs: Sequence[LayerCacheSpec]) -> list[LayerCacheSpec]:
        """Return what of `specs` a request of this plan stores: nothing for what prompts skip."""
        used = set[Memory]()
        for sublayer, memory in self.memory.items():
            if plan.action("prefill", sublayer) is not Action.SKIP:
                used |= memory
        return [
            spec.only({kind for kind in ("attention", "mixer") if (i, kind) in used})
            for i, spec in enumerate(specs)
        ]

    def retention(self, plans: Sequence[SkipPlan], specs: Sequence[LayerCacheSpec]) -> Retention:
        """Return which tokens of each layer a request may read that runs with any of `plans`.

        Where a layer reads another one's keys, or with a mask of the model's own, all are held; on
        several ranks also where some heads see everything: ranks run the same graphs.
        """
        attending = sum(s.kind == "attention" for s in self.sublayers)
        if not any(plan.windows for plan in plans):
            return ()
        if attending != sum(spec.attends for spec in specs):
            return ()
        narrow = {
            s: a.kv_heads * self._parts(s)
            for s, a in self.attention.items()
            if isinstance(a, Attention) and a.reads_windows
        }
        found = retention(plans, len(specs), narrow)
        return tuple(map(self._held, found, specs))

    def _held(
        self, heads: tuple[Retained | None, ...], spec: LayerCacheSpec
    ) -> tuple[Retained | None, ...]:
        """Return what is read of each K/V head that a layer stores, by what is of all heads."""
        if self._shares is None and len(heads) == spec.key_heads == spec.value_heads:
            return heads
        every = together(heads)
        return () if every is None else (every,) * spec.key_heads

    @cached_property
    def unskippable(self) -> frozenset[Sublayer]:
        """The sublayers that hand more than the residual stream to later ones."""
        pairs = zip(self.sublayers, _pieces(self._captured), strict=True)
        return frozenset(s for s, piece in pairs if piece is not None and piece.outputs > 1)

    @cached_property
    def attention(self) -> dict[Sublayer, Attention | UnsupportedError]:
        """For each attention sublayer what its windows can be; the error where there can be none.

        That is read from the graph of a prompt without padding, which needs no mask but for what
        the model itself leaves out.
        """
        found: dict[Sublayer, Attention | UnsupportedError] = {}
        for sublayer, piece in zip(self.sublayers, _pieces(self._captured), strict=True):
            if sublayer.kind == "attention" and piece is not None:
                try:
                    if self._own_attention:
                        raise UnsupportedError(
                            f"layer {sublayer.layer}'s attention cannot have a window: it is a "
                            "function of the user's own"
                        )
                    found[sublayer] = attention_of(piece)
                except UnsupportedError as error:
                    found[sublayer] = error
        return found

    @cached_property
    def kv_heads(self) -> dict[Sublayer, int]:
        """For each attention that can have any window how many K/V heads all ranks have."""
        pairs = self.attention.items()
        known = {s: a for s, a in pairs if isinstance(a, Attention) and a.sees == "everything"}
        return {s: attention.kv_heads * self._parts(s) for s, attention in known.items()}

    def _parts(self, sublayer: Sublayer) -> int:
        share = self.share(sublayer)
        return 1 if share is None else share.parts

    def share(self, sublayer: Sublayer) -> HeadShare | None:
        """Which K/V heads of an attention are on this rank; None if that is not known."""
        return _ALL if self._shares is None else self._shares.get(sublayer.layer)

    def local(self, windows: Mapping[Sublayer, Window]) -> dict[Sublayer, Window]:
        """Return windows with those full heads that are on this rank, as it counts them."""
        found = dict(windows)
        for sublayer, window in windows.items():
            attention, share = self.attention.get(sublayer), self.share(sublayer)
            if window.full_heads and isinstance(attention, Attention) and share is not None:
                own = share.own(window.full_heads, attention.kv_heads)
                found[sublayer] = replace(window, full_heads=own)
        return found

    def heads(self, windows: Mapping[Sublayer, Window]) -> dict[str, list[tuple[int, int]]]:
        """Return (sinks, tokens) of each K/V head of this rank, where attention has windows."""
        found = {}
        for sublayer, window in self.local(windows).items():
            attention = self.attention[sublayer]
            if isinstance(attention, Attention):
                found[str(sublayer)] = window.by_head(attention.kv_heads)
        return found


def piece_keys(captures: Iterable[CapturedPhase]) -> dict[Sublayer, tuple[str, ...]]:
    """Return for each sublayer the key of its piece in each capture: equal ones run the same code.

    Args:
        captures: At least one, of the same model.
    """
    every = list(captures)
    groups = zip(*(_pieces(captured) for captured in every), strict=True)
    keys = (tuple(p.key for p in group if p is not None) for group in groups)
    return dict(zip(every[0].sublayers, keys, strict=True))


def _pieces(captured: CapturedPhase) -> list[Piece | None]:
    return [piece_of(call) for _, call in sorted(sublayer_calls(captured.outer.graph).items())]
