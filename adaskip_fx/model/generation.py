"""The loop of `generate` around the decode steps, greedy or sampling, without waiting for a GPU.

transformers' loop waits for the device three times a token: sampling reads twice whether the
probabilities are valid, and the end of the request is read before the next step is begun. Between
those the GPU is idle. Here the end of a request is read while the next step is running already
(`ahead`); where that step turns out to be one too many, it is taken back. Tokens are drawn as
``torch.multinomial`` draws them, from the same random numbers, but validity is read with the end.

Everything else is as there, in the same order: what the processors, the criteria and the streamer
are handed, what is returned, and how many random numbers are used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from ..kv_cache.cache import SkipCache
from ..kv_cache.names import output_fields


def following(prepare: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A model's ``prepare_inputs_for_generation`` that keeps the request when the cache goes.

    Phi-3's leaves its cache out at the length where another table of positions begins, so that the
    whole text runs again. What runs is still the request: with its own plan and stop tokens. (It
    leaves out an empty one as well, which can as well be filled.)
    """

    @functools.wraps(prepare)
    def followed(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(self, *args, **kwargs)
        name = self._adaskip.generate_argument
        given = kwargs.get(name)
        if isinstance(given, SkipCache) and inputs.get(name) is None:
            inputs[name] = given.anew() if given.length else given
        return inputs

    return followed


def serves(config: Any, synced_gpus: bool, model_kwargs: dict[str, Any]) -> bool:
    """Whether this loop can stand in for transformers': one process, with a cache."""
    alone = not synced_gpus and not config.is_assistant
    return alone and model_kwargs.get("use_cache") is not False


def run(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Callable[..., torch.Tensor],
    stopping_criteria: Any,
    config: Any,
    streamer: Any,
    model_kwargs: dict[str, Any],
    cache: SkipCache,
) -> Any:
    """Prefill, then decode until the criteria say stop.

    Args:
        model: a compiled model.
        input_ids: the prompt, int64 [B, T].
        logits_processor: from tokens so far and scores [B, V] to scores.
        stopping_criteria: transformers' list; from tokens so far to bool [B].
        config: the request's prepared generation config.
        streamer: is handed each token, int64 [B], on the CPU; or None.
        model_kwargs: for forward.
        cache: the request's, which is among them. The model may go on with another one.

    Returns:
        The tokens, int64 [B, T + new], or a ``GenerateDecoderOnlyOutput`` if the config says so.

    Raises:
        RuntimeError: the probabilities of a token are not numbers.
    """
    kept = _Kept.of(config)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    longest = stopping_criteria.max_length
    host = _Host(input_ids, streamer)
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.int64, device=input_ids.device)
    logits, model_kwargs = _logits(
        model,
        model._prefill(input_ids, config, model_kwargs, is_first_iteration=True),
        model_kwargs,
        input_ids.device,
    )
    name = model._adaskip.generate_argument
    while True:
        cache = model_kwargs[name]
        scores = logits_processor(input_ids, logits)
        kept.add(scores, logits)
        invalid: torch.Tensor | None = None
        if config.do_sample:
            tokens, invalid = _draw(scores)
        else:
            tokens = scores.argmax(-1)
        if ends:  # a row that has ended goes on with padding
            pad = config._pad_token_tensor.to(input_ids.device)
            tokens = tokens * unfinished + pad * (1 - unfinished)
        input_ids = torch.cat((input_ids, tokens.unsqueeze(1)), 1)
        unfinished = unfinished & ~stopping_criteria(input_ids, kept.scores)
        host.send(tokens, unfinished.max() == 0, invalid)
        full = longest is not None and input_ids.shape[1] >= longest
        ahead = not full and model._adaskip.may_run_ahead(cache)
        if ahead:
            logits, model_kwargs = _next(model, input_ids, model_kwargs)
        stop, broken = host.receive()
        if ahead and (stop or broken) and model_kwargs[name] is cache:
            cache.keep_first(cache.length - 1)
        if broken:
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        if stop or full:
            break
        if not ahead:
            logits, model_kwargs = _next(model, input_ids, model_kwargs)
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return input_ids
    held = output_fields(GenerateDecoderOnlyOutput, cache)
    return GenerateDecoderOnlyOutput(
        sequences=input_ids, scores=kept.scores, logits=kept.logits, **held
    )


def _next(
    model: Any, input_ids: torch.Tensor, model_kwargs: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """One decode step: logits [B, V] in float32 for the token after the last."""
    inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
    outputs = model(**inputs, return_dict=True)
    return _logits(model, outputs, model_kwargs, input_ids.device)


def _logits(
    model: Any, outputs: Any, model_kwargs: dict[str, Any], device: torch.device
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The last token's logits where the caller's tokens are, and arguments of the next step."""
    # a copy: the logits of a whole prompt are large, and must not be held by a view
    last = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=device)
    return last, model._update_model_kwargs_for_generation(outputs, model_kwargs)


def _draw(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A token of each row of `scores` [B, V] as `torch.multinomial` draws it, and if it cannot.

    Of exponential variables with rates p the least is the i-th with probability p[i].
    """
    probabilities = torch.softmax(scores, -1)
    race = torch.empty_like(probabilities).exponential_(1)
    invalid = probabilities[:, 0].isnan().any()  # if one of a row is, all are
    return (probabilities / race).argmax(-1), invalid


@dataclass
class _Kept:
    """What the caller asked to have of every step; None for what was not asked for."""

    scores: tuple[torch.Tensor, ...] | None
    logits: tuple[torch.Tensor, ...] | None

    @classmethod
    def of(cls, config: Any) -> _Kept:
        asked = bool(config.return_dict_in_generate)
        return cls(
            () if asked and config.output_scores else None,
            () if asked and config.output_logits else None,
        )

    def add(self, scores: torch.Tensor, logits: torch.Tensor) -> None:
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)


class _Host:
    """A step's token and whether to stop, on their way to the host while the device goes on."""

    def __init__(self, like: torch.Tensor, streamer: Any) -> None:
        on_gpu = like.device.type == "cuda"
        self._streamer = streamer
        self._flags = torch.zeros(2, dtype=torch.bool, pin_memory=on_gpu, device="cpu")
        size = like.shape[0]
        self._tokens = torch.zeros(size, dtype=torch.int64, pin_memory=on_gpu, device="cpu")
        self._there = torch.Event(like.device) if on_gpu else None

    def send(self, tokens: torch.Tensor, stop: torch.Tensor, invalid: torch.Tensor | None) -> None:
        """Begin to copy. `invalid` None: that cannot be."""
        flags = torch.stack((stop, invalid if invalid is not None else torch.zeros_like(stop)))
        self._flags.copy_(flags, non_blocking=True)
        if self._streamer is not None:
            self._tokens.copy_(tokens, non_blocking=True)
        if self._there is not None:
            self._there.record()

    def receive(self) -> tuple[bool, bool]:
        """Wait for what was sent last, and stream the token; returns (stop, invalid)."""
        if self._there is not None:
            self._there.synchronize()
        stop, invalid = self._flags.tolist()
        if self._streamer is not None and not invalid:
            self._streamer.put(self._tokens.clone())
        return stop, invalid
