"""The loop of ``generate`` around the decode steps, greedy or sampling, without waiting for a GPU.

transformers' loop waits for the device three times a token: sampling reads twice whether the
probabilities are valid, and the end of the request is read before the next step is begun. Between
those the GPU is idle. Here the end of a request is read while the next step is running already
(it runs ahead); where that step turns out to be one too many, it is taken back. Tokens are drawn as
``torch.multinomial`` draws them, from the same random numbers, but validity is read with the end.

Since 5.23 transformers has the same idea of a stop flag that is read a step late: ``StopCheck`` and
``DeferredStopCheck`` in ``transformers/generation/utils.py``. ``DeferredStopCheck.is_supported``
allows it on Apple's GPUs (``mps``) only, and sampling still calls ``torch.multinomial``, which
waits. So this loop is still needed on CUDA. Where both run, they differ in two things that callers
see: tokens are streamed there a step later than here, and the step that was one too many is taken
back in the cache only where ``generate`` returns it or the caller passed it.

Everything else is as there, in the same order: the arguments of processors, criteria and the
streamer, what is returned, and how many random numbers are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from ..kv_cache.argument_names import output_fields
from ..kv_cache.cache import SkipCache
from ..speculation.acceptance import Greedy, Rule, Sampling
from ..utils.generation_internals import next_kwargs, pad_token, prefill
from ..utils.stateless_rules import ending_tokens
from ..utils.transformers_types import DecodingCall, Output
from . import direct
from .draftable import leave_out_positions
from .readback import Readback
from .recorded import Recorded

if TYPE_CHECKING:
    from .types import CompiledCausalLM


def serves(call: DecodingCall) -> bool:
    """Return whether this loop can stand in for transformers': one process, with a cache.

    It records scores and logits; whoever asks for more is served by transformers' own.
    """
    config = call.config
    more = config.output_hidden_states or config.output_attentions
    alone = not call.synced_gpus and not config.is_assistant
    return alone and not more and call.model_kwargs.get("use_cache") is not False


def run(model: CompiledCausalLM, request: DecodedRequest) -> Any:
    """Decode until the criteria say stop.

    Args:
        model: a compiled model.
        request: the request, whose prompt has been read. The model may go on with another cache.

    Returns:
        The tokens, int64 [B, T + new], or a ``GenerateDecoderOnlyOutput`` if the config says so.

    Raises:
        RuntimeError: the probabilities of a token are not numbers.
    """
    try:
        return _decoded(model, request)
    except BaseException:
        request.abandon()
        raise


def _decoded(model: CompiledCausalLM, request: DecodedRequest) -> Any:
    longest, streamer = request.call.stopping_criteria.max_length, request.call.streamer
    while True:
        cache = request.cache
        request.choose_tokens()
        full = longest is not None and request.written >= longest
        ahead = not full and model._adaskip.may_run_ahead(cache) and request.goes_ahead
        if ahead:
            request.run_step()
        ends = True  # also where a streamer raises
        try:
            stop, invalid = request.host.receive()
            model._adaskip.ranks.check()  # what came may be of a step that was aborted
            ends = stop or invalid
        finally:
            if ahead and ends and request.cache is cache:
                cache.keep_first(cache.length - 1)
        if invalid:
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        request.received()
        if stop or full:
            break
        if not ahead and request.advance():
            cache = request.cache
            break
    if streamer is not None:
        streamer.end()
    return request.result(cache)


class DecodedRequest:
    """A request while it is decoded.

    Attributes:
        call: what ``generate`` called its loop with. The request's cache is among the arguments of
            forward.
        input_ids: the tokens so far, int64 [B, T].
        logits: of the token after them, float32 [B, V].
        model_kwargs: forward's arguments for the next step.
        unfinished: which rows go on, int64 [B].
        ends: the tokens that end a request of one row, where the host alone sees that it ends:
            the device has less to do for each token then. None where it does not.
        recorded: what the caller asked to have of every step.
        host: what the host has to know of a step.
        rule: how tokens are chosen by scores.
        pads: whether padding follows where a row has ended; else the model's own tokens do.
        goes_direct: whether steps need nothing but their tokens; then `model_kwargs` stays.
    """

    def __init__(self, model: CompiledCausalLM, call: DecodingCall) -> None:
        """Read the prompt.

        Args:
            model: a compiled model.
            call: see the class.
        """
        self._model, self.call = model, call
        ends = any(hasattr(rule, "eos_token_id") for rule in call.stopping_criteria)
        self.pads = ends and pad_token(call.config) is not None
        self.input_ids = call.input_ids
        self.model_kwargs = call.model_kwargs
        rows, device = call.input_ids.shape[0], call.input_ids.device
        self.unfinished = torch.ones(rows, dtype=torch.int64, device=device)
        self.recorded = Recorded.nothing(call.config)
        self.ends = ending_tokens(call.stopping_criteria) if rows == 1 else None
        self.host = Readback(call.input_ids, call.streamer, self.ends)
        self.rule: Rule = Sampling() if call.config.do_sample else Greedy()
        self._take(prefill(model, call.input_ids, call.config, self.model_kwargs))
        self.prepare()
        if direct.is_usual(type(model)):
            leave_out_positions(model, self.model_kwargs)
        self.goes_direct = direct.are_possible(model, self.model_kwargs)

    def abandon(self) -> None:
        """Leave the cache so that the text can go on on it, after something was raised."""

    def prepare(self) -> None:
        """Do what need not wait for the prompt, which a device may still be reading."""

    @property
    def cache(self) -> SkipCache:
        """The cache of the next step."""
        cache: SkipCache = self.model_kwargs[self._model._adaskip.generate_argument]
        return cache

    @property
    def input_ids(self) -> torch.Tensor:
        """See the class; what was put behind them is so when they are asked for."""
        if self._behind:
            self.input_ids = torch.cat((self._ids, *self._behind), 1)
        return self._ids

    @input_ids.setter
    def input_ids(self, ids: torch.Tensor) -> None:
        self._ids, self._behind = ids, list[torch.Tensor]()
        self._written = ids.shape[1]

    @property
    def written(self) -> int:
        """How many tokens there are so far."""
        return self._written

    def put_behind(self, tokens: torch.Tensor) -> None:
        """Have tokens [B, n] follow those there are, as soon as somebody asks for them."""
        self._behind.append(tokens)
        self._written += tokens.shape[1]

    @property
    def goes_ahead(self) -> bool:
        """Whether the next step may be begun before the host knows this one's token."""
        return True

    def received(self) -> None:
        """Take note that the host has the last token."""

    def choose_tokens(self) -> None:
        """Choose a token of each row by the logits, and send the host whether to stop."""
        scores = self.call.logits_processor(self.input_ids, self.logits)
        tokens, invalid = self.rule.choose(scores)
        tokens = self.append(tokens, scores, self.logits)
        self.tell(tokens, invalid)

    def tell(self, tokens: torch.Tensor, invalid: torch.Tensor | None) -> None:
        """Send the host what it has to know of a step; `invalid`: whether tokens are none."""
        stop = self.unfinished.max() == 0 if self.ends is None else None
        self.host.send(tokens, stop, invalid)

    def append(
        self, tokens: torch.Tensor, scores: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Append a token of each row, and see which rows have ended with it.

        Args:
            tokens: int64 [B].
            scores: what they were chosen by, float32 [B, V].
            logits: what scores were made of, float32 [B, V].

        Returns:
            The tokens, with padding for rows that had ended before.
        """
        self.recorded.add(scores, logits)
        tokens = self.padded(tokens.unsqueeze(1)).squeeze(1)
        self.input_ids = torch.cat((self.input_ids, tokens.unsqueeze(1)), 1)
        if self.ends is not None:
            return tokens
        ended = self.call.stopping_criteria(self.input_ids, self.recorded.scores)
        self.unfinished = self.unfinished & ~ended
        return tokens

    def padded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return tokens int64 [B, n], padding in their place where a row has ended."""
        pad = pad_token(self.call.config)
        if not self.pads or pad is None or self.ends is not None:
            return tokens
        going = self.unfinished.unsqueeze(1)
        return tokens * going + pad.to(tokens.device) * (1 - going)

    def counted(self, unfinished: torch.Tensor) -> torch.Tensor:
        """Return the rows whose tokens are no padding, int64 [B]."""
        return unfinished if self.pads else torch.ones_like(unfinished)

    def process(self, text: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the scores of logits [B, V], which stay as they are: some write on their own."""
        process: Callable[..., torch.Tensor] = self.call.logits_processor
        return process(text, logits.clone()) if self.call.logits_processor else logits

    def advance(self) -> bool:
        """Run what comes after the last token; returns whether the request has ended with it."""
        self.run_step()
        return False

    def run_step(self) -> None:
        """Run one decode step, for the logits of the token after the last."""
        logits = self.directly(self.input_ids[:, -1:])
        if logits is not None:
            self._keep_last(logits)
            return
        inputs = self._model.prepare_inputs_for_generation(
            self.input_ids, next_sequence_length=1, **self.model_kwargs
        )
        self._take(self._model(**inputs, return_dict=True))

    def directly(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Return the logits of new tokens [B, T, V], by the runtime; None if forward is needed."""
        return direct.step(self._model, self.cache, tokens) if self.goes_direct else None

    def _take(self, outputs: Output) -> None:
        """Take the last token's logits, and the next arguments."""
        self._keep_last(outputs.logits)
        self.model_kwargs = next_kwargs(self._model, outputs, self.model_kwargs)

    def _keep_last(self, logits: torch.Tensor) -> None:
        """Take the last token's logits where the caller's tokens are."""
        # a copy: the logits of a whole prompt are large, and must not be held by a view
        last, device = logits[:, -1], self.input_ids.device
        self.logits = last.to(copy=True, dtype=torch.float32, device=device)

    def result(self, cache: SkipCache) -> Any:
        """Return what ``generate`` returns, with the cache of the last step."""
        if not self.call.config.return_dict_in_generate:
            return self.input_ids
        return GenerateDecoderOnlyOutput(
            sequences=self.input_ids,
            scores=self.recorded.scores,
            logits=self.recorded.logits,
            **output_fields(GenerateDecoderOnlyOutput, cache),
        )
