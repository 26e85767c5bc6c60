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
        found, scores = self._candidates.get_candidates(text)
        tokens = found[:, text.shape[1] :][:, :most].to(text.device)
        if not tokens.shape[1]:
            return None
        if scores is None or not context.samples:
            return Drafts(tokens)
        chances = torch.softmax(scores[:, : tokens.shape[1]].to(text.device), -1)
        return Drafts(tokens, chances)
