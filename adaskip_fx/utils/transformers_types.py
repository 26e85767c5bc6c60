"""Types of what is used of transformers' objects, which has no annotations that mypy could read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

#: Keyword arguments of forward that ``generate`` keeps from step to step.
ModelKwargs: TypeAlias = dict[str, Any]


class ModelConfig(Protocol):
    """The configuration of a decoder; its sizes are read by name, where it has them."""

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model has an encoder, which is refused."""

    def get_text_config(self) -> ModelConfig:
        """Return the part that is about text."""


class Output(Protocol):
    """What a decoder's forward returns."""

    @property
    def logits(self) -> torch.Tensor:
        """[B, kept, V]."""


class CausalLM(Protocol):
    """A decoder of transformers' with a language-model head, as far as it is used here."""

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its floating point parameters."""

    @property
    def training(self) -> bool:
        """Whether it is in training mode."""

    @property
    def loss_function(self) -> Callable[..., Any]:
        """From logits [B, T, V], labels [B, T] and the vocabulary's size to a loss."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run forward with its hooks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one step."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield its parameters."""

    def buffers(self) -> Iterator[torch.Tensor]:
        """Yield its buffers."""

    def get_input_embeddings(self) -> Any:
        """Return the module that embeds tokens; its weight is [V, H]."""

    def set_attn_implementation(self, name: str | None) -> None:
        """Use an attention implementation that is registered under a name."""

    def get_experts_implementation(self) -> dict[str, str | None]:
        """Return the implementation of experts of each part that has a config, "" for all."""

    def set_experts_implementation(self, names: dict[str, str | None]) -> None:
        """Use implementations of experts, by part."""

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> ModelKwargs:
        """Return forward's arguments for the next step of ``generate``."""


class GenerationConfigLike(Protocol):
    """A generation config as ``generate`` has prepared it."""

    do_sample: bool
    is_assistant: bool
    use_cache: bool | None
    cache_implementation: str | None
    return_dict_in_generate: bool
    output_scores: bool
    output_logits: bool
    output_hidden_states: bool | None
    output_attentions: bool | None


class LogitsProcessor(Protocol):
    """The list of what changes scores."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [B, V], of the tokens so far, int64 [B, T], and scores [B, V]."""

    def __iter__(self) -> Iterator[Any]:
        """Yield the processors one by one."""


class Candidates(Protocol):
    """Who drafts in assisted generation."""

    def get_candidates(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a text with drafts after it, int64 [B, T + k], and their scores [B, k, V]."""


#: Makes who drafts, of the tokens so far and the arguments of forward that go with them.
MakeCandidates: TypeAlias = Callable[[torch.Tensor, ModelKwargs], Candidates]


class StoppingCriteria(Protocol):
    """The list of criteria that ends a request."""

    @property
    def max_length(self) -> int | None:
        """Tokens at most, those of the prompt included."""

    def __call__(self, input_ids: torch.Tensor, scores: Any) -> torch.Tensor:
        """Return which rows have ended, bool [B]."""

    def __iter__(self) -> Iterator[Any]:
        """Yield the criteria one by one."""


class Streamer(Protocol):
    """Where tokens of a request go as they are found."""

    def put(self, value: torch.Tensor) -> None:
        """Take a token of each row, int64 [B], on the CPU."""

    def end(self) -> None:
        """Take note that there are no more."""


@dataclass(frozen=True)
class DecodingCall:
    """What ``generate`` calls its decoding loop with, greedy or sampling.

    Attributes:
        input_ids: the prompt, int64 [B, T].
        logits_processor: from the tokens so far and scores [B, V] to scores.
        stopping_criteria: transformers' list; from the tokens so far to bool [B].
        config: the request's prepared generation config.
        synced_gpus: whether several processes must make as many steps.
        streamer: gets each token; or None.
        model_kwargs: for forward; the request's cache is among them.
    """

    input_ids: torch.Tensor
    logits_processor: LogitsProcessor
    stopping_criteria: StoppingCriteria
    config: GenerationConfigLike
    synced_gpus: bool
    streamer: Streamer | None
    model_kwargs: ModelKwargs
