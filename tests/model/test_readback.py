"""What the host learns of a request's tokens, against a plain loop over lists of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import BaseStreamer

from adaskip_fx.model.readback import Readback

EOS = frozenset({0, 3})
_TOKENS = st.integers(0, 6)


class Kept(BaseStreamer):
    """A streamer that keeps the tensors it is handed, and reads them at the end."""

    def __init__(self) -> None:
        self.handed: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.handed.append(value)

    def end(self) -> None:
        raise AssertionError("whoever decodes says that it is the end")


@dataclass(frozen=True)
class Request:
    """The tokens that a model would choose, and what ends its request.

    Attributes:
        steps: of each step the tokens of all rows.
        longest: how many steps there may be.
        invalid: the step whose tokens could not be drawn; None if all could.
        told: whether the device tells when to stop, as it does for several rows; else the host
            sees it from the tokens.
        looked_at: steps that the host reads together with their tokens (drafts).
    """

    steps: tuple[tuple[int, ...], ...]
    longest: int
    invalid: int | None
    told: bool
    looked_at: frozenset[int] = field(default=frozenset())


@st.composite
def requests(draw: st.DrawFn) -> Request:
    rows, count = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    row = st.tuples(*[_TOKENS] * rows)
    return Request(
        tuple(draw(st.lists(row, min_size=count, max_size=count))),
        draw(st.integers(1, count)),
        draw(st.none() | st.integers(0, count - 1)),
        rows > 1 or draw(st.booleans()),
        draw(st.frozensets(st.integers(0, count - 1), max_size=2)),
    )


def expected(request: Request) -> tuple[str, list[list[int]]]:
    """How a loop over lists ends, and the tokens that a streamer has then."""
    said: list[list[int]] = []
    over = [False] * len(request.steps[0])
    for step, row in enumerate(request.steps[: request.longest]):
        invalid = step == request.invalid
        if not invalid and step not in request.looked_at:
            said.append(list(row))
        over = [o or token in EOS for o, token in zip(over, row, strict=True)]
        if invalid:
            return f"invalid after {step + 1}", said
        if all(over):
            return f"eos after {step + 1}", said
    return f"length after {request.longest}", said


def decoded(request: Request, streams: bool) -> tuple[str, list[list[int]]]:
    """How it ends by what a `Readback` gives, and the tokens that its streamer has then."""
    rows, streamer = len(request.steps[0]), Kept()
    prompt = torch.zeros(rows, 5, dtype=torch.int64)
    host = Readback(prompt, streamer if streams else None, None if request.told else EOS)
    unfinished, tokens = torch.ones(rows, dtype=torch.bool), torch.empty(rows, dtype=torch.int64)
    end = f"length after {request.longest}"
    for step, row in enumerate(request.steps[: request.longest]):
        tokens.copy_(torch.tensor(row))  # in one buffer, as a static cache's steps have them
        for token in EOS:
            unfinished &= tokens != token
        wrong = step == request.invalid
        stop = ~unfinished.any()
        if step in request.looked_at:
            host.know(bool(stop), wrong)
        else:
            may_fail = torch.tensor(wrong) if request.invalid is not None else None
            host.send(tokens, stop if request.told else None, may_fail)
        tokens.fill_(-1)  # the next step runs ahead
        stopped, invalid = host.receive()
        if invalid or stopped:
            end = f"{'invalid' if invalid else 'eos'} after {step + 1}"
            break
    return end, [t.tolist() for t in streamer.handed]


@given(requests(), st.booleans())
def test_a_request_ends_where_a_plain_loop_does(request: Request, streams: bool) -> None:
    end, said = expected(request)
    assert decoded(request, streams) == (end, said if streams else [])


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(("last", "end"), [(3, "eos after 3"), (4, "length after 3")])
def test_the_last_token_that_fits_may_end_it(last: int, end: str, told: bool) -> None:
    steps = ((5,), (6,), (last,), (0,))
    request = Request(steps, 3, None, told)
    assert decoded(request, streams=True) == (end, [[5], [6], [last]]) == expected(request)


def test_rows_end_together() -> None:
    """Each has ended once; what follows in a row that has ended is streamed as it comes."""
    request = Request(((3, 5), (5, 5), (5, 0), (5, 5)), 4, None, told=True)
    assert decoded(request, streams=True)[0] == "eos after 3" == expected(request)[0]


def _stale(self: Readback) -> tuple[bool, bool]:
    """What was sent before is taken for what was sent last."""
    before = self.__dict__.setdefault("before", (False, False))
    self.__dict__["before"] = _RECEIVE(self)
    return before  # type: ignore[no-any-return]


def _by_flags_alone(self: Readback) -> tuple[bool, bool]:
    self._ends = None
    return _RECEIVE(self)


def _uncopied(self: Readback) -> tuple[bool, bool]:
    """The streamer is handed what the next step is written over."""
    streamer, self._streamer = self._streamer, None
    stop, invalid = _RECEIVE(self)
    self._streamer = streamer
    if streamer is not None and not invalid:
        streamer.put(self._tokens)
    return stop, invalid


_RECEIVE = Readback.receive
_RUNS: Sequence[Request] = (
    Request(((5,), (6,), (3,), (4,)), 4, None, told=False),
    Request(((5,), (6,), (3,), (4,)), 4, None, told=True),
    Request(((5, 5), (3, 5), (4, 0), (1, 1)), 4, None, told=True),
)


@pytest.mark.breaks
@pytest.mark.parametrize("wrong", [_stale, _by_flags_alone, _uncopied])
def test_what_is_read_wrongly_shows(monkeypatch: pytest.MonkeyPatch, wrong: object) -> None:
    """The companion."""
    assert [decoded(r, streams=True) for r in _RUNS] == [expected(r) for r in _RUNS]
    monkeypatch.setattr(Readback, "receive", wrong)
    assert [decoded(r, streams=True) for r in _RUNS] != [expected(r) for r in _RUNS]
