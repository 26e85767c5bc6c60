"""The parts of transformers' ``generate`` that it does not promise, as adaskip_fx uses them.

`docs/explanation/private-interfaces.md` lists them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from .transformers_types import (
    Candidates,
    DecodingCall,
    GenerationConfigLike,
    LogitsProcessor,
    MakeCandidates,
    ModelKwargs,
    Output,
    StoppingCriteria,
    Streamer,
)

#: The method of a model that says what follows from a step for the arguments of the next one.
UPDATES = "_update_model_kwargs_for_generation"


def pad_token(config: GenerationConfigLike) -> torch.Tensor | None:
    """Return the id that ended rows go on with, of a prepared generation config."""
    token: torch.Tensor | None = config._pad_token_tensor  # type: ignore[attr-defined]
    return token


def stop_tokens(config: GenerationConfigLike) -> torch.Tensor | None:
    """Return the ids after which ``generate`` feeds a row with padding only, int64 [n]."""
    ends: torch.Tensor | None = config._eos_token_tensor  # type: ignore[attr-defined]
    tokens = [t.reshape(-1) for t in (ends, pad_token(config)) if t is not None]
    return torch.cat(tokens) if tokens else None


def prefill(
    model: Any, input_ids: torch.Tensor, config: GenerationConfigLike, model_kwargs: ModelKwargs
) -> Output:
    """Run a prompt as ``generate`` does, and return what the model's forward returned."""
    output: Output = model._prefill(input_ids, config, model_kwargs, is_first_iteration=True)
    return output


def is_whole_text(
    input_ids: torch.Tensor, config: GenerationConfigLike, model_kwargs: ModelKwargs
) -> bool:
    """Return whether ``generate`` was handed all of a text, or what is new of it alone.

    The mask says so, which is of all of it; one that says nothing has left its length behind.
    """
    mask = model_kwargs.get("attention_mask")
    length = mask.shape[1] if mask is not None else getattr(config, "_mask_length", None)
    return length in (None, input_ids.shape[1])


def next_kwargs(
    model: Any, outputs: Output | None, model_kwargs: ModelKwargs, tokens: int = 1
) -> ModelKwargs:
    """Return the arguments of forward that ``generate`` keeps for a text with `tokens` more.

    `outputs` are of the step that has read it so far; None where it is still to be read.
    """
    known: Any = {} if outputs is None else outputs
    update = model._update_model_kwargs_for_generation
    updated: ModelKwargs = update(known, model_kwargs, num_new_tokens=tokens)
    return updated


class GenerateHooks:
    """The methods of a model that ``generate`` calls, under names of our own.

    A class in front of a model's own class overrides those that begin with ``_adaskip``.
    """

    def _adaskip_prepare_cache(
        self, config: GenerationConfigLike, model_kwargs: ModelKwargs, mode: Any, max_length: int
    ) -> None:
        """Put the request's cache among the arguments of forward."""
        raise NotImplementedError

    def _adaskip_prompt(
        self, input_ids: torch.Tensor, config: GenerationConfigLike, model_kwargs: ModelKwargs
    ) -> AbstractContextManager[None]:
        """Return the context in which a prompt is run."""
        raise NotImplementedError

    def _adaskip_assisted(
        self, input_ids: torch.Tensor, config: GenerationConfigLike, model_kwargs: ModelKwargs
    ) -> AbstractContextManager[None]:
        """Return the context in which drafts are verified, the prompt included."""
        raise NotImplementedError

    def _adaskip_decode(self, call: DecodingCall) -> Any:
        """Decode, greedy or sampling; None where transformers' own loop is to do it."""
        raise NotImplementedError

    def _adaskip_draft(self, call: DecodingCall, assistant: MakeCandidates, model: Any) -> Any:
        """Decode with drafts of an assistant, a model or not; None for transformers' own loop."""
        raise NotImplementedError

    def _adaskip_recall(self, model_kwargs: ModelKwargs) -> None:
        """Have the model's positions go on as those of the request's cache do."""
        raise NotImplementedError

    def _adaskip_next_kwargs(self, model_kwargs: ModelKwargs) -> ModelKwargs:
        """Return the arguments of forward for the next step, as transformers made them."""
        raise NotImplementedError

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfigLike,
        model_kwargs: ModelKwargs,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        self._adaskip_prepare_cache(
            generation_config, model_kwargs, generation_mode, max_cache_length
        )

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: ModelKwargs
    ) -> Any:
        self._adaskip_recall(model_kwargs)
        return super()._prepare_position_ids_for_generation(  # type: ignore[misc]
            inputs_tensor, model_kwargs
        )

    def _prefill(
        self,
        input_ids: torch.Tensor,
        generation_config: GenerationConfigLike,
        model_kwargs: ModelKwargs,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        with self._adaskip_prompt(input_ids, generation_config, model_kwargs):
            return super()._prefill(  # type: ignore[misc]
                input_ids, generation_config, model_kwargs, *args, **kwargs
            )

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessor,
        stopping_criteria: StoppingCriteria,
        generation_config: GenerationConfigLike,
        synced_gpus: bool = False,
        streamer: Streamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        # (``custom_generate=`` would be the public way, but takes the streamer away)
        steps = (input_ids, logits_processor, stopping_criteria, generation_config)
        decoded = self._adaskip_decode(DecodingCall(*steps, synced_gpus, streamer, model_kwargs))
        if decoded is not None:
            return decoded
        return super()._sample(  # type: ignore[misc]
            *steps, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs
        )

    def _assisted_decoding(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessor,
        stopping_criteria: StoppingCriteria,
        generation_config: GenerationConfigLike,
        inputs_tensor: torch.Tensor | None = None,  # ``generate`` looks whether it is taken
        **kwargs: Any,
    ) -> Any:
        steps = (input_ids, logits_processor, stopping_criteria, generation_config)
        named = "synced_gpus", "streamer", "assistant_model", "assistant_tokenizer", "tokenizer"
        given = {name: kwargs.get(name) for name in named}
        others = {name: value for name, value in kwargs.items() if name not in named}

        def assistant(text: torch.Tensor, of_text: ModelKwargs) -> Candidates:
            made: Candidates = self._get_candidate_generator(  # type: ignore[attr-defined]
                *(generation_config, text, inputs_tensor, logits_processor, of_text),
                assistant_model=given["assistant_model"],
                target_tokenizer=given["tokenizer"],
                assistant_tokenizer=given["assistant_tokenizer"],
            )
            return made

        call = DecodingCall(*steps, bool(given["synced_gpus"]), given["streamer"], others)
        drafted = self._adaskip_draft(call, assistant, given["assistant_model"])
        if drafted is not None:
            return drafted
        with self._adaskip_assisted(input_ids, generation_config, kwargs):
            return super()._assisted_decoding(  # type: ignore[misc]
                *steps, inputs_tensor=inputs_tensor, **kwargs
            )

    def _update_model_kwargs_for_generation(
        self, outputs: Output, model_kwargs: ModelKwargs, *args: Any, **kwargs: Any
    ) -> ModelKwargs:
        updated: ModelKwargs = super()._update_model_kwargs_for_generation(  # type: ignore[misc]
            outputs, model_kwargs, *args, **kwargs
        )
        return self._adaskip_next_kwargs(updated)
