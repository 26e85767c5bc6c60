"""When a streamer is called where several ranks draft together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from adaskip_fx.model.host_text import HostText
from adaskip_fx.model.led import Failed, LeadingRequest, Plain
from tests.support.generation import Collected


def test_a_streamer_has_all_tokens_before_the_others_get_an_order() -> None:
    """Where it fails, they wait for an order, from which they can be called away."""
    streamer, said = Collected(), list[tuple[type, list[int]]]()
    request: Any = LeadingRequest.__new__(LeadingRequest)
    ranks = SimpleNamespace(first=lambda _, order: said.append((type(order()), streamer.tokens[:])))
    request._model = SimpleNamespace(_adaskip=SimpleNamespace(ranks=ranks))
    request._text = HostText([[1]], streamer)
    request._text.extend([[2], [3]])
    request._say(Plain())
    request._text.extend([[4]])
    request._say(Failed(ValueError("of the streamer, it may be")))  # which is not called again
    assert said == [(Plain, [2, 3]), (Failed, [2, 3])]
    assert request._text.handed == 3
