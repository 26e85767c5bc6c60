"""Tokens on the host: a streamer has each once and in order, if not at once."""

from __future__ import annotations

import torch

from adaskip_fx.model.host_text import HostText
from tests.support.generation import Collected


def test_a_streamer_is_given_blocks_when_there_is_time() -> None:
    streamer = Collected()
    text = HostText([[1, 2]], streamer)
    text.extend([[3], [4]])
    assert text.rows == [[1, 2, 3, 4]]
    assert (streamer.tokens, text.handed) == ([], 2)
    text.hand_on()
    assert (streamer.tokens, text.handed) == ([3, 4], 4)
    text.extend([[5]])
    text.put(torch.tensor([6]))
    assert (streamer.tokens, text.handed) == ([3, 4, 5, 6], 6)
    text.extend([[7]])
    text.end()
    assert streamer.tokens == [3, 4, 5, 6, 7]


def test_without_a_streamer_nothing_is_late() -> None:
    text = HostText([[1], [2]], None)
    text.extend([[3, 4]])
    assert text.rows == [[1, 3], [2, 4]]
    assert text.handed == 2
