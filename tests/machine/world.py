"""Requests of a compiled model and of the eager one side by side, and what may come of each call.

The meaning that is modelled: there are two module trees, the compiled model's and the original's.
Python state counts in the compiled model's own; a tensor that is replaced on the original is
followed, and so is what is done to its adapters; any other change of the original is refused at the
next prompt, unless the same was done to the compiled model. A request keeps the state that it began
with: decode steps run on in it (or are refused, if no graph of it was captured in time, or adapters
were merged meanwhile), a further prompt is refused once state is another. Values that are written
in place are seen by all at once.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, StoppingCriteria
from transformers.cache_utils import DynamicLayer

from adaskip_fx.model.handle import runtime_of
from tests.machine import structures
from tests.machine.compare import TOLERANCE, Outcome, cache_of, difference
from tests.machine.edits import Change, Edit, Values
from tests.machine.refusals import is_listed
from tests.machine.structures import Side, shared

_MOST_REQUESTS = 3
#: Whether transformers cuts the mask of a prompt in chunks as if the cache were empty, so that its
#: own answer is wrong on a filled one (5.23 does not; of 5.20 to 5.22 nothing is known).
_CUTS_MASKS = Version(transformers.__version__) < Version("5.23")


class DifferenceError(AssertionError):
    """The compiled model did something that it must not."""


@dataclass(frozen=True)
class Expected:
    """What may come of a call.

    Attributes:
        refused: whether it must not be refused, may be, or must.
        headings: of the documentation's tables that its message may be in.
        text: what the message must contain besides.
    """

    refused: Literal["never", "may", "must"] = "never"
    headings: tuple[str, ...] = ()
    text: str = ""

    def or_refused(self, heading: str) -> Expected:
        """Likewise, where there is another reason to refuse, which may be found first."""
        refused = "may" if self.refused == "never" else self.refused
        return Expected(refused, (*self.headings, heading))


@dataclass(eq=False)
class Request:
    """A request of a compiled model, and the same one of the eager model.

    Attributes:
        side: whose.
        model: the eager model in the state that the request began with.
        began: what that state was, as `World.state` says it.
        ours, theirs: the caches.
        text: all tokens, int64 [B, T].
        mask: 0 at padding, int64 [B, T]; None without padding.
        stored: how many of them the caches hold.
    """

    side: Side
    model: Any
    began: Any
    ours: Any
    theirs: Any
    text: torch.Tensor
    mask: torch.Tensor | None = None
    stored: int = 0

    @property
    def rows(self) -> int:
        return int(self.text.shape[0])

    def __str__(self) -> str:
        return f"<request, {self.rows} x {self.stored}>"


@dataclass(frozen=True)
class Options:
    """How `generate` is called."""

    new: int = 2
    sample: bool = False
    seed: int = 0
    as_dictionary: bool = True
    use_cache: bool = True
    stop_token: int | None = None
    stop_length: int | None = None
    chunk: int | None = None
    beams: int = 1
    lookup: int | None = None

    @property
    def drafts(self) -> dict[str, Any]:
        """What makes drafts: without it, the same tokens are decoded one by one."""
        return {"prompt_lookup_num_tokens": self.lookup} if self.lookup is not None else {}

    def arguments(self, prompt: int) -> dict[str, Any]:
        given: dict[str, Any] = {
            "max_new_tokens": self.new,
            "do_sample": self.sample,
            "pad_token_id": 0,
        }
        if self.sample:
            given |= {"temperature": 0.8, "top_k": 20}
        if self.as_dictionary:
            given |= {"return_dict_in_generate": True, "output_logits": True}
        if not self.use_cache:
            given["use_cache"] = False
        if self.stop_token is not None:
            given["eos_token_id"] = self.stop_token
        if self.stop_length is not None:
            given["stopping_criteria"] = [_Longer(prompt + self.stop_length)]
        if self.chunk is not None:
            given["prefill_chunk_size"] = self.chunk
        if self.beams > 1:
            given |= {"num_beams": self.beams, "num_return_sequences": self.beams}
        return given


class _Longer(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Stops when there are that many tokens."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), ids.shape[1] >= self.length, device=ids.device)


@contextlib.contextmanager
def _wide() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


_Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Surroundings:
    """What a call is made in.

    Attributes:
        ours: around the compiled model's.
        theirs: around the eager model's: where that changes its numbers.
        allowed: relative error.
    """

    ours: _Context
    theirs: _Context = contextlib.nullcontext
    allowed: float = TOLERANCE[torch.float32]


def _autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


SURROUNDINGS: Mapping[str, Surroundings] = MappingProxyType(
    {
        "none": Surroundings(contextlib.nullcontext),
        "inference mode": Surroundings(torch.inference_mode),
        "meta": Surroundings(lambda: torch.device("meta")),
        "float64": Surroundings(_wide, _wide),
        "autocast": Surroundings(_autocast, _autocast, TOLERANCE[torch.bfloat16]),
    }
)


@dataclass
class _InForce:
    """An edit, and how to take it back."""

    edit: Edit
    undo: list[Callable[[], None]] = field(default_factory=list)


def embeddings(model: Any, rows: int, count: int, seed: int) -> torch.Tensor:
    """Random embeddings [rows, count, H], which are no token's."""
    generator = torch.Generator().manual_seed(seed)
    weight = model.get_input_embeddings().weight
    drawn = torch.randn(rows, count, weight.shape[1], generator=generator)
    return drawn.to(weight.dtype)


def tokens(rows: int, count: int, seed: int) -> torch.Tensor:
    """Random tokens, int64 [rows, count]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 60, (rows, count), generator=generator)


class World:
    """A pair of models and the requests that run on them.

    Attributes:
        pair: the models, which many worlds use one after the other.
        requests: those that are live.
        answered, refused: calls that gave a value and calls that were refused.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.pair = structures.pair(name)
        self.structure = self.pair.structure
        self.requests: list[Request] = []
        self.answered = self.refused = 0
        self._original: dict[str, _InForce] = {}
        self._agreed = set[str]()  # what was in force on both trees when a prompt came
        self._sides: dict[Side, dict[str, _InForce]] = {side: {} for side in self.pair.sides}

    @property
    def room(self) -> bool:
        """Whether another request may be begun."""
        return len(self.requests) < _MOST_REQUESTS

    @property
    def _asked(self) -> tuple[str, ...]:
        """What a call may ask for besides; Mamba's hidden states are not the stream."""
        return () if self.structure.family == "mamba" else ("output_hidden_states",)

    # State -----------------------------------------------------------------------------------

    def state(self, side: Side) -> frozenset[str]:
        """What is in force on a compiled model, by name; values that were written do not count."""
        own = (i.edit for i in self._sides[side].values())
        followed = (i.edit for i in self._original.values())
        return frozenset(
            [e.name for e in own if e.kind != "value"]
            + [e.name for e in followed if e.kind in ("tensor", "adapter")]
        )

    def offered(self, side: Side | None) -> list[Edit]:
        """What may be done now to a compiled model, or to the original (None)."""
        active = self._sides[side] if side is not None else self._original
        everywhere = [
            i.edit for tree in (self._original, *self._sides.values()) for i in tree.values()
        ]
        found = []
        for edit in self.pair.edits.values():
            if (edit.compiled if side is not None else edit.original) is None:
                continue
            beside = (
                everywhere
                if edit.kind != "python"
                else [
                    *(i.edit for i in active.values()),
                    *(e for e in everywhere if e.kind != "python"),
                ]
            )
            if not any(edit.conflicts(other) for other in beside):
                found.append(edit)
        return found

    def in_force(self, side: Side | None) -> list[Edit]:
        """What can be taken back there."""
        active = self._sides[side] if side is not None else self._original
        return [i.edit for i in active.values()]

    @torch.no_grad()
    def edit(self, side: Side | None, edit: Edit) -> None:
        """Make a change on a compiled model, or on the original (None), and on the references."""
        if edit.casts:
            self.requests.clear()
        active = self._sides[side] if side is not None else self._original
        follow = () if edit.kind == "python" and side is None else self.pair.sides
        sides = (side,) if side is not None else follow
        self._freeze(sides)
        force = _InForce(edit)
        writes = edit.kind != "python" or edit.writes
        values = Values.of(self.pair.original) if writes else Values()
        force.undo.append(values.put_back)
        model = side.compiled if side is not None else self.pair.original
        done = self._change(model, edit, force)
        values.done()
        if done.error is not None:
            for step in reversed(force.undo):
                step()
            if side is None or not is_listed(done.error):
                raise DifferenceError(f"{edit} on {_name(side)}: {done}") from done.error
            self.refused += 1
            return
        if edit.kind != "value":
            for one in sides:
                written = edit.written if side is None and edit.written else edit.apply
                failed = self._change(one.reference, replace(edit, apply=written), force).error
                if failed is not None:
                    raise failed
        active[edit.name] = force

    @torch.no_grad()
    def take_back(self, side: Side | None, edit: Edit) -> None:
        """Undo a change."""
        if edit.casts:
            self.requests.clear()
        active = self._sides[side] if side is not None else self._original
        self._freeze((side,) if side is not None else self.pair.sides)
        for step in reversed(active.pop(edit.name).undo):
            step()
        if side is not None and edit.kind == "tensor":
            self._share_again(side)

    def _share_again(self, side: Side) -> None:
        """Give a compiled model, on which no tensor is replaced now, the original's.

        (What it had before an edit may have been the original's for a while only, and followed.)
        """
        for path, module in self.pair.original.named_modules():
            try:
                own = side.compiled.get_submodule(path)
            except AttributeError:  # an adapter that was deleted
                continue
            for mine, theirs in (
                (own._parameters, module._parameters),
                (own._buffers, module._buffers),
            ):
                mine.update(theirs)

    def _change(self, model: Any, edit: Edit, force: _InForce) -> Outcome:
        change = Change(model)
        outcome = Outcome.of(lambda: edit.apply(model))
        change.done()
        force.undo.append(change.undo)
        return outcome

    def _freeze(self, sides: tuple[Side, ...]) -> None:
        """Leave requests a copy of the eager model as it is now, before it is changed."""
        for side in sides:
            live = [r for r in self.requests if r.model is side.reference]
            if live:
                frozen = shared(side.reference)
                for request in live:
                    request.model = frozen

    def end(self) -> None:
        """Take everything back."""
        self.requests.clear()
        try:
            for tree in (*self._sides.values(), self._original):
                for force in reversed(tree.values()):
                    for step in reversed(force.undo):
                        with torch.no_grad():
                            step()
                tree.clear()
            for side in self.pair.sides:
                self._share_again(side)
                # what both have done since a look is not told from tensors of the model's own
                runtime_of(side.compiled).graphs.states.look()
            if not self.pair.values.hold():
                raise AssertionError("a sequence was taken back, and tensors hold other values")
        except BaseException:
            structures.drop(self.name)
            raise

    # What may come of a call -----------------------------------------------------------------

    def _expected(self, side: Side, request: Request | None = None) -> Expected:
        """What may come of a prompt: of a new request, or a further one.

        Where both trees had a change in common and one has taken it back, it is not said what they
        are compared with: with what they were when they were compiled, or with what they had.
        """
        own = [i.edit for i in self._sides[side].values()]
        alien = [
            i.edit
            for i in self._original.values()
            if i.edit.kind == "python" and i.edit.name not in self._sides[side]
        ]
        both = {*self._original} & {*self._sides[side]}
        apart = self._agreed - both
        self._agreed |= both
        expected = Expected()
        if request is not None and request.began != self.state(side):
            expected = Expected("must", ("State",), "" if alien else "changed since")
        elif any(e.original == "refused" and e.name not in apart for e in alien):
            expected = Expected("must", ("State",), "of the original model")
        elif apart or any(e.original != "ignored" for e in alien):
            expected = Expected("may", ("State",))
        if any(e.compiled == "refused" for e in own):
            return Expected("must", ("State", "Calls"))
        if any(e.compiled == "either" for e in own):
            return expected.or_refused("State").or_refused("Calls")
        return expected

    def _expected_step(self, request: Request) -> Expected:
        """What may come of a decode step."""
        own = [i.edit for i in self._sides[request.side].values()]
        if any(e.compiled == "refused" for e in own):
            return Expected("must", ("State", "Calls"))
        written = {e.name for e in self.pair.edits.values() if e.written is not None}
        if written & {*request.began} != written & {*self._original}:
            return Expected("must", ("State",))  # its graphs would add adapters a second time
        python = any(i.edit.kind == "python" for i in self._original.values())
        another = request.began != self.state(request.side)
        if another or python or any(e.compiled == "either" for e in own):
            return Expected("may", ("State", "Calls"))
        return Expected()

    # Calls -----------------------------------------------------------------------------------

    def begin(
        self,
        side: Side,
        count: int,
        seed: int = 0,
        *,
        rows: int = 1,
        keep: int = 1,
        surroundings: str = "none",
        cache: Literal["none", "own", "foreign"] = "none",
        embedded: bool = False,
    ) -> None:
        """A prompt without padding, by embeddings or ids; a request if a cache comes back."""
        ids, expected = tokens(rows, count, seed), self._expected(side)
        new = embeddings(side.reference, rows, count, seed) if embedded else ids
        name, reference = side.cache_argument, side.reference
        if cache == "foreign":
            expected = expected.or_refused("Caches")
        given = {
            "none": lambda: None,
            "own": side.compiled.adaskip.new_cache,
            "foreign": _new_cache,
        }
        mine = given[cache]() if cache != "foreign" else _new_cache(reference)
        theirs = None if cache == "none" else _new_cache(reference)
        side.phase.prompt_end = None
        got = self._both(
            side,
            lambda: _forward(side.compiled, new, name, mine, keep),
            lambda cache: _forward(reference, new, name, cache, keep),
            theirs,
            expected,
            f"a prompt of {count} {'embeddings' if embedded else 'tokens'}",
            surroundings,
        )
        if got is None or surroundings == "autocast":
            return
        if cache_of(got[0]) is not None and self.room:
            whole = _new_cache(reference)  # its window, if it has one, keeps all tokens
            with torch.no_grad(), SURROUNDINGS[surroundings].theirs():
                _forward(reference, new, name, whole, keep)
            began = self.state(side)
            self.requests.append(
                Request(side, reference, began, cache_of(got[0]), whole, ids, stored=count)
            )

    def adopt(self, side: Side, count: int, more: int, seed: int) -> None:
        """A cache that the eager model has filled is handed to the compiled one, which goes on."""
        ids, theirs = tokens(1, count, seed), _new_cache(side.reference)
        with torch.no_grad():
            filled = Outcome.of(
                lambda: _forward(side.reference, ids, side.cache_argument, theirs, 1)
            )
        if filled.error is not None:  # the eager model itself does not run as it is now
            return
        request = Request(
            side, side.reference, self.state(side), copy.deepcopy(theirs), theirs, ids, stored=count
        )
        expected = self._expected(side).or_refused("Caches")
        before = self.answered
        self._step(request, tokens(1, more, seed + 1), expected, "none", None)
        if self.answered > before:
            self._keep(request)

    def rows(self, request: Request, chosen: tuple[int, ...]) -> None:
        """Go on with other rows of a cache: of those there are, some, once or more often."""
        index = torch.tensor([row % request.rows for row in chosen])
        got = Outcome.of(lambda: request.ours.batch_select_indices(index))
        if got.error is not None:
            if not is_listed(got.error, ("Caches",)):
                raise DifferenceError(f"batch_select_indices: {got}") from got.error
            self.refused += 1
            return
        _choose_rows(request.theirs, index)
        request.text = request.text[index]
        request.mask = request.mask[index] if request.mask is not None else None
        self._check_length(request, "batch_select_indices")

    def alone(self, side: Side, count: int, seed: int, *, arguments: Mapping[str, Any]) -> None:
        """A call that leaves nothing behind, with other arguments of forward."""
        ids = tokens(1, count, seed)
        expected = self._expected(side)
        if not {*arguments} <= {"use_cache", "return_dict", *self._asked}:
            expected = expected.or_refused("Calls")
        name, reference = side.cache_argument, side.reference
        side.phase.prompt_end = None
        self._both(
            side,
            lambda: _forward(side.compiled, ids, name, None, 1, **arguments),
            lambda cache: _forward(reference, ids, name, cache, 1, **arguments),
            None,
            expected,
            f"a prompt of {count} tokens with {dict(arguments)}",
        )

    def labelled(self, side: Side, count: int, seed: int, ignored: int, items: int | None) -> None:
        """The loss of a prompt, of which the first labels do not count; over a number of items."""
        ids = tokens(1, count, seed)
        labels = ids.clone()
        labels[:, : min(ignored, count - 1)] = -100
        arguments: dict[str, Any] = {"labels": labels, "return_dict": True}
        if items is not None:
            arguments["num_items_in_batch"] = items
        name, reference = side.cache_argument, side.reference
        side.phase.prompt_end = None
        self._both(
            side,
            lambda: _forward(side.compiled, ids, name, None, 0, **arguments),
            lambda cache: _forward(reference, ids, name, cache, 0, **arguments),
            None,
            self._expected(side),
            f"a prompt of {count} tokens with labels",
        )

    def packed(self, side: Side, first: int, second: int, seed: int) -> None:
        """Two texts in one row, told apart by positions that begin again, and no cache."""
        places = torch.cat((torch.arange(first), torch.arange(second))).unsqueeze(0)
        arguments = {"use_cache": False, "position_ids": places}
        self.alone(side, first + second, seed, arguments=arguments)

    def further(self, request: Request, count: int, seed: int, surroundings: str = "none") -> None:
        """More of the prompt, several tokens at once."""
        self._anew(request)
        expected = self._expected(request.side, request)
        self._step(request, tokens(request.rows, count, seed), expected, surroundings, None)

    def decode(self, request: Request, seed: int, surroundings: str = "none") -> None:
        """A decode step; on a cache that is empty again, a prompt of one token."""
        self._anew(request)
        first = not request.stored
        expected = self._expected(request.side, request) if first else self._expected_step(request)
        end = None if first else 0
        self._step(request, tokens(request.rows, 1, seed), expected, surroundings, end)

    def _anew(self, request: Request) -> None:
        """A call on an empty cache begins a request."""
        if not request.stored:
            request.model, request.began = request.side.reference, self.state(request.side)

    def _step(
        self,
        request: Request,
        ids: torch.Tensor,
        expected: Expected,
        surroundings: str,
        prompt_end: int | None,
    ) -> None:
        side, count = request.side, ids.shape[1]
        name = side.cache_argument
        mask = None
        if request.mask is not None:
            before = request.mask[:, : request.stored]
            mask = torch.cat((before, torch.ones_like(ids)), 1)
        given: dict[str, Any] = {"attention_mask": mask} if mask is not None else {}
        if request.began != self.state(side):  # how an output looks is said by the config of now
            given["return_dict"] = True
        side.phase.prompt_end = prompt_end
        got = self._both(
            side,
            lambda: _forward(side.compiled, ids, name, request.ours, 1, **given),
            lambda cache: _forward(request.model, ids, name, cache, 1, **given),
            request.theirs,
            expected,
            f"{count} token(s) after {request.stored}",
            surroundings,
            request,
        )
        if got is None:
            return
        request.text = torch.cat((request.text[:, : request.stored], ids), 1)
        request.mask, request.stored = mask, request.stored + count

    def generate(
        self,
        side: Side,
        lengths: tuple[int, ...],
        seed: int,
        options: Options,
        surroundings: str = "none",
    ) -> None:
        """`generate` on new rows of these lengths, padded on the left."""
        longest = max(lengths)
        ids, mask = tokens(len(lengths), longest, seed), None
        if min(lengths) < longest:
            places = torch.arange(longest).expand(len(lengths), -1)
            mask = (places >= longest - torch.tensor(lengths).unsqueeze(1)).long()
            ids = ids * mask
        request = Request(side, side.reference, self.state(side), None, None, ids, mask)
        if self._generate(request, ids, mask, options, self._expected(side), surroundings):
            self._keep(request)

    def drafts(self, side: Side, length: int, seed: int, options: Options) -> None:
        """`generate` with drafts of a prompt that comes twice; greedy, so that tokens are the same.

        transformers itself refuses drafts for models that only keep states.
        """
        specs = side.compiled.adaskip.new_cache().specs
        if not any(spec.attends for spec in specs):
            return
        ids = tokens(1, length, seed).repeat(1, 2)
        request = Request(side, side.reference, self.state(side), None, None, ids)
        expected = self._expected(side)
        if any(spec.mixes for spec in specs):
            expected = expected.or_refused("Generate")
        plain = replace(options, sample=False, stop_length=None, chunk=None, use_cache=True)
        if self._generate(request, ids, None, plain, expected):
            self._keep(request)

    def turn(self, request: Request, count: int, seed: int, options: Options) -> None:
        """`generate` on a request's cache, with that many tokens more."""
        self._anew(request)
        new = tokens(request.rows, count, seed)
        expected = self._expected(request.side, request)
        if not any(spec.attends for spec in request.ours.specs):
            # transformers does not leave out what such a cache has seen: it is given what is new
            seen, last = request.text[:, : request.stored], request.text[:, request.stored :]
            new = torch.cat((last, new), 1)
            self._generate(request, new, None, options, expected, seen=seen)
            return
        ids = torch.cat((request.text, new), 1)
        mask = request.mask
        if mask is not None:
            mask = torch.cat((mask, torch.ones_like(ids[:, mask.shape[1] :])), 1)
        if _CUTS_MASKS and options.chunk is not None:
            expected = expected.or_refused("Calls")
        self._generate(request, ids, mask, options, expected)

    def _keep(self, request: Request) -> None:
        if request.ours is not None and self.room:
            self.requests.append(request)

    def _generate(
        self,
        request: Request,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        options: Options,
        expected: Expected,
        surroundings: str = "none",
        seen: torch.Tensor | None = None,
    ) -> bool:
        side, prompt = request.side, ids.shape[1]
        name = side.cache_argument
        given = options.arguments(prompt) | {
            "attention_mask": mask if mask is not None else torch.ones_like(ids)
        }
        mine = {name: request.ours} if request.ours is not None else {}
        cache = request.theirs
        if cache is None and options.use_cache:
            cache = _new_cache(request.model)
        after = list[torch.Tensor]()

        def ours() -> Any:
            torch.manual_seed(options.seed)
            got = side.compiled.generate(ids, **given, **mine, **options.drafts)
            after.append(torch.get_rng_state())
            return got

        def theirs(cache: Any) -> Any:
            torch.manual_seed(options.seed)
            held = {name: cache} if cache is not None else {}
            want = request.model.generate(ids, **given, **held)
            after.append(torch.get_rng_state())
            return want

        side.phase.prompt_end = prompt if options.use_cache else None  # else all is a prompt
        what = f"generate on {list(ids.shape)} with {options}"
        live = request if request.ours is not None else None
        got = self._both(side, ours, theirs, cache, expected, what, surroundings, live)
        if got is None:
            return False
        if not torch.equal(*after):
            raise DifferenceError(f"{what}: another number of random numbers was used")
        output = got[0]
        # whoever wants to go on asks for the cache, which holds the beams that were left
        if not options.as_dictionary or options.beams > 1:
            if live is not None:
                self.requests.remove(live)
            return False
        request.ours, request.theirs = cache_of(output), cache_of(got[1])
        if request.ours is None:
            return False
        text = output["sequences"]
        request.text = text if seen is None else torch.cat((seen, text), 1)
        request.stored = request.text.shape[1] - 1
        if mask is not None:
            more = torch.ones_like(request.text[:, mask.shape[1] :])
            request.mask = torch.cat((mask, more), 1)
        self._check_length(request, what)
        return True

    def crop(self, request: Request, count: int) -> None:
        """Forget tokens, as `DynamicCache.crop` means it in the installed version."""
        stateful = any(not isinstance(x, DynamicLayer) for x in request.theirs.layers)
        length = _after_crop(request.stored, count)
        if length is None:
            expected = Expected("must")
        elif stateful:
            expected = Expected("may", ("Caches",))
        else:
            expected = Expected()
        got = Outcome.of(lambda: request.ours.crop(count))
        what = f"crop({count}) of {request.stored} tokens"
        if got.error is not None:
            if expected.refused == "never":
                raise DifferenceError(f"{what}: {got}") from got.error
            if expected.refused == "may" and not is_listed(got.error, expected.headings):
                raise DifferenceError(f"{what}: {got}") from got.error
            self._check_length(request, f"a refused {what}")
            self.refused += 1
            return
        if length is None:
            raise DifferenceError(f"{what} was done, which transformers refuses")
        self.answered += 1
        if stateful and length < request.stored:  # nothing to compare with
            self.requests.remove(request)
            return
        for layer in request.theirs.layers:
            if length < request.stored:
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        request.stored, request.text = length, request.text[:, :length]
        if request.mask is not None:
            request.mask = request.mask[:, :length]
        self._check_length(request, what)

    def copied(self, request: Request, surroundings: str = "none") -> None:
        """A deep copy of a cache: another request with the same past."""
        twin = copy.copy(request)
        with SURROUNDINGS[surroundings].ours():
            twin.ours = copy.deepcopy(request.ours)
        twin.theirs = copy.deepcopy(request.theirs)
        self.requests.append(twin)
        self._check_length(twin, "a deep copy")

    def shallow(self, request: Request) -> None:
        """A shallow copy of a cache, which the request goes on with; the first one is let go."""
        got = Outcome.of(lambda: copy.copy(request.ours))
        if got.error is not None:
            if not is_listed(got.error, ("Caches",)):
                raise DifferenceError(f"copy.copy: {got}") from got.error
            self.refused += 1
            return
        request.ours = got.value
        self._check_length(request, "a shallow copy")

    def elsewhere(self, request: Request, side: Side) -> None:
        """A cache that is handed to another compiled model of the same original."""
        ids, name = tokens(request.rows, 2, 0), side.cache_argument
        with torch.no_grad():
            got = Outcome.of(lambda: _forward(side.compiled, ids, name, request.ours, 1))
        if got.error is None or not is_listed(got.error, ("Caches", "State", "Calls")):
            raise DifferenceError(f"the cache of another compiled model: {got}") from got.error
        self.refused += 1
        self._check_length(request, "being handed to another")

    def forget(self, request: Request) -> None:
        """Let a request go."""
        self.requests.remove(request)

    # Comparing -------------------------------------------------------------------------------

    def _both(
        self,
        side: Side,
        ours: Callable[[], Any],
        theirs: Callable[[Any], Any],
        cache: Any,
        expected: Expected,
        what: str,
        surroundings: str = "none",
        request: Request | None = None,
    ) -> tuple[Any, Any] | None:
        """Call both models; what they gave, or None if the compiled one refused.

        Raises:
            DifferenceError: anything but the same values, or a refusal that is expected.
        """
        around = SURROUNDINGS[surroundings]
        if surroundings != "none":
            what = f"{what} in {surroundings}"
        recorders = [e.recorded for e in self.pair.edits.values() if e.recorded is not None]
        counts = [[r() for r in recorders]]
        with torch.no_grad(), around.ours():
            got = Outcome.of(ours)
        counts.append([r() for r in recorders])
        if got.error is not None:
            self._judge(got, lambda: theirs(copy.deepcopy(cache)), expected, what, around)
            if request is not None:
                self._check_length(request, f"a refused call ({what})")
            return None
        if expected.refused == "must":
            wanted = expected.text or " or ".join(expected.headings)
            raise DifferenceError(f"{what} gave a value, but must be refused: {wanted}")
        with torch.no_grad(), around.theirs():
            want = Outcome.of(lambda: theirs(cache))
        counts.append([r() for r in recorders])
        if want.error is not None:
            message = f"{what} gave a value, but the model itself raises {want}"
            raise DifferenceError(message) from want.error
        dtype = next(side.reference.parameters()).dtype
        allowed = max(around.allowed, TOLERANCE[dtype])
        # of models that were handed a cache, and are told not to use one, some hand it back
        handed = cache is not None and not side.compiled.config.use_cache
        differs = difference(got.value, want.value, allowed, caches=not handed)
        if differs:
            raise DifferenceError(f"{what} gave another value: {differs}; {self._in_force_text()}")
        steps = [b - a for a, b in zip(counts[0], counts[1], strict=True)]
        should = [b - a for a, b in zip(counts[1], counts[2], strict=True)]
        if steps != should:
            raise DifferenceError(f"{what}: hooks ran {steps} times instead of {should}")
        self.answered += 1
        return got.value, want.value

    def _judge(
        self,
        got: Outcome,
        theirs: Callable[[], Any],
        expected: Expected,
        what: str,
        around: Surroundings,
    ) -> None:
        """Whether an error was expected; the model's own in these surroundings always is."""
        assert got.error is not None
        listed = is_listed(got.error, expected.headings) and expected.text in str(got.error)
        if expected.refused != "never" and listed:
            self.refused += 1
            return
        with torch.no_grad(), around.ours():
            own = Outcome.of(theirs)
        if own.error is None:
            message = f"{what}: {got}; {self._in_force_text()}"
            raise DifferenceError(message) from got.error
        self.refused += 1

    def _in_force_text(self) -> str:
        trees = [("the original", self._original)]
        trees += [(f"compiled model {i}", t) for i, t in enumerate(self._sides.values())]
        found = [f"{name}: {', '.join(tree)}" for name, tree in trees if tree]
        return f"in force on {'; on '.join(found)}" if found else "nothing was changed"

    def _check_length(self, request: Request, what: str) -> None:
        if isinstance(request.ours, DynamicCache):  # a foreign one that was refused
            if not _alike(request.ours, request.theirs):
                raise DifferenceError(f"{what} has changed a cache that it did not take")
            return
        got, want = request.ours.get_seq_length(), request.stored
        if got != want:
            raise DifferenceError(f"after {what} the cache has {got} tokens instead of {want}")


def _name(side: Side | None) -> str:
    return "the original" if side is None else "a compiled model"


def _forward(
    model: Any, new: torch.Tensor, name: str, cache: Any, keep: int, **arguments: Any
) -> Any:
    """Call a model with new tokens: ids [B, T], or embeddings [B, T, H]."""
    if cache is not None:
        arguments[name] = cache
    arguments["inputs_embeds" if new.dim() == 3 else "input_ids"] = new
    return model(logits_to_keep=keep, **arguments)


def _new_cache(model: Any) -> DynamicCache:
    """An empty cache of transformers'; of attention it keeps all tokens, whatever the window."""
    cache = DynamicCache(config=model.config.get_text_config())
    stateful = any(not isinstance(layer, DynamicLayer) for layer in cache.layers)
    return cache if stateful else DynamicCache()


def _tensors(layer: Any) -> dict[tuple[str, int], torch.Tensor]:
    """Keys, values and states of a layer of transformers' cache."""
    held = {n: {0: getattr(layer, n, None)} for n in ("keys", "values")}
    held |= {n: getattr(layer, n, {}) for n in ("conv_states", "recurrent_states")}
    return {
        (name, index): tensor
        for name, tensors in held.items()
        for index, tensor in tensors.items()
        if tensor is not None
    }


def _alike(one: DynamicCache, other: DynamicCache) -> bool:
    """Whether two hold the same values."""
    if len(one.layers) != len(other.layers):
        return False
    for mine, theirs in zip(map(_tensors, one.layers), map(_tensors, other.layers), strict=True):
        if mine.keys() != theirs.keys() or any(not mine[k].equal(theirs[k]) for k in mine):
            return False
    return True


def _choose_rows(cache: DynamicCache, index: torch.Tensor) -> None:
    """``batch_select_indices``, also of layers with states, where transformers has none."""
    for layer in cache.layers:
        for name in ("keys", "values"):  # also of an empty cache, where transformers does nothing
            held = getattr(layer, name, None)
            if held is not None:
                setattr(layer, name, held[index])
        for name in ("conv_states", "recurrent_states"):
            held = getattr(layer, name, {})
            held.update({i: t[index] for i, t in held.items() if t is not None})


def _after_crop(stored: int, count: int) -> int | None:
    """How many of `stored` tokens `DynamicCache.crop(count)` leaves; None if it refuses."""
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, stored, 1), torch.zeros(1, 1, stored, 1), 0)
    try:
        cache.crop(count)
    except (ValueError, RuntimeError):
        return None
    return int(cache.get_seq_length())
