"""Drafts of transformers' assisted generation, as a proposer among others."""

from __future__ import annotations

import torch

from ..speculation.proposals import Context, Drafts
from ..utils.transformers_types import Candidates, GenerationConfigLike, MakeCandidates
from .generation import DecodedRequest


class Assistant:
    """Proposes for one request what an ``assistant_model`` or transformers' prompt lookup drafts.

    How many tokens is decided as for other proposers; `assistant_confidence_threshold` may make
    them fewer.

    Attributes:
        name: what statistics call it.
        free: whether it costs nothing to ask, as looking up does.
    """

    name = "assistant"

    def __init__(
        self, make: MakeCandidates, request: DecodedRequest, config: GenerationConfigLike
    ) -> None:
        """Draft for `request`; the other arguments are of its call of ``generate``."""
        self._make, self._request = make, request
        self._candidates: Candidates | None = None
        self._drafted: torch.Tensor | None = None
        self.free = getattr(config, "prompt_lookup_num_tokens", None) is not None

    def begin(self) -> Assistant:
        """Return itself: it was made for the request."""
        return self

    def propose(self, context: Context, most: int) -> Drafts | None:
        """Return at most so many tokens; None where there are none."""
        text = context.input_ids
        if self._candidates is None:
            self._candidates = self._make(text, self._request.model_kwargs)
        if hasattr(self._candidates, "num_assistant_tokens"):
            self._candidates.num_assistant_tokens = most
        self._forget(text)
        found, scores = self._candidates.get_candidates(text)
        self._drafted = found
        tokens = found[:, text.shape[1] :][:, :most].to(text.device)
        if not tokens.shape[1]:
            return None
        if scores is None or not context.samples:
            return Drafts(tokens)
        chances = torch.softmax(scores[:, : tokens.shape[1]].to(text.device), -1)
        return Drafts(tokens, chances)

    def _forget(self, text: torch.Tensor) -> None:
        """Have an assistant's cache hold no draft that the text does not have.

        It forgets drafts by itself where it is asked in every round, which it is not here.
        """
        cache = getattr(self._candidates, "assistant_kwargs", {}).get("past_key_values")
        kind = type(self._candidates).__name__
        if cache is None or self._drafted is None or kind != "AssistedCandidateGenerator":
            return
        shared = min(self._drafted.shape[1], text.shape[1])
        same = self._drafted[0, :shared].to(text.device) == text[0, :shared]
        known = int(same.to(torch.int64).cumprod(0).sum())
        beyond = cache.get_seq_length() - known
        if beyond > 0:
            cache.crop(-beyond)
