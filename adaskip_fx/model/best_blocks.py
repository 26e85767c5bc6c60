"""Blocks of drafts that the host accepts: of a greedy request it looks at the best tokens alone.

Where nothing but these decides, which drafts stand, where rows end and what follows are comparisons
of a few numbers that the host has or reads anyway. So the device has nothing to do for them, and
the text there is put together when somebody asks for it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..runtime.ready_step import ReadyStep
from ..runtime.static_runner import size_of
from ..speculation.acceptance import Greedy, best_of_rows
from ..speculation.proposals import Drafts
from ..speculation.speculation import Speculation
from ..utils.generation_internals import pad_token
from ..utils.stateless_rules import ending_tokens
from ..utils.transformers_types import DecodingCall
from . import direct
from .blocks import BlockRequest

if TYPE_CHECKING:
    from .types import CompiledCausalLM


class BestBlockRequest(BlockRequest):
    """A request whose blocks are accepted by the host where it can see to that.

    Attributes:
        by_best: whether it can: a draft stands if it is the best token, no processor and no
            criterion of the user's own is asked, and no scores are returned.
        ready: steps that may be next, by how many tokens they have.
    """

    def __init__(
        self, model: CompiledCausalLM, call: DecodingCall, speculation: Speculation
    ) -> None:
        """Read the prompt; arguments as of `DraftedRequest`."""
        pad, ends = pad_token(call.config), ending_tokens(call.stopping_criteria)
        padding = None if pad is None else int(pad)  # looked at before the prompt is begun
        self.ready: dict[int, ReadyStep] = {}
        super().__init__(model, call, speculation)
        self._padding = padding if self.pads else None
        self._text.ends = ends or ()
        plain = not call.logits_processor and not self.recorded.asked
        self.by_best = ends is not None and plain and isinstance(self.rule, Greedy)

    def accept(self, drafts: Drafts, logits: torch.Tensor) -> tuple[int, bool]:
        """Append the drafts that stand; see `BlockRequest`. Logits `by_best` are of any dtype."""
        if not self.by_best:
            return super().accept(drafts, logits)
        accepted, ended = self._accept_best(drafts, logits)
        if self._following is None and not ended:  # a row has ended, and others go on
            self.logits = logits[:, accepted].to(torch.float32, copy=True)
        return accepted, ended

    def _accept_best(self, drafts: Drafts, logits: torch.Tensor) -> tuple[int, bool]:
        best, count = logits.argmax(-1), drafts.count
        if self._knows(drafts):
            drafted, tokens = drafts.listed, best.tolist()
        else:
            both = torch.cat((drafts.tokens, best), 1).tolist()
            drafted, tokens = [row[:count] for row in both], [row[count:] for row in both]
        going, padding = self._text.going, self._padding
        stood, columns, after = best_of_rows(drafted, tokens, going, self._text.ends, padding)
        kept = len(columns)
        if padding is None or all(going):
            self.put_behind(best[:, :kept])
        else:
            self.put_behind(torch.tensor(columns, device="cpu").T.to(best.device))
        if after != going:
            self.unfinished = torch.tensor(after, device="cpu").to(self.unfinished)
        fewer = kept <= stood
        accepted = kept if fewer else stood
        self.stats.tokens += kept
        self._text.extend(columns[:accepted])
        if not fewer:
            self._following = columns[stood]
            self.host.know(stop=not any(after), invalid=False)
        return accepted, fewer and not any(after)

    def get_ready(self) -> None:
        """Look at what the next block needs, while the device is busy."""
        if self.by_best and self.goes_direct:
            self.ready = direct.ready(self._model, self.cache)

    def read_at_once(self, drafts: Drafts) -> torch.Tensor | None:
        """Run the last token and drafts that the host knows.

        Returns:
            Logits of at least these [B, k + 1, V], which the next block's may overwrite; None
            where the step needs more than tokens.
        """
        if not self._knows(drafts):
            return None
        tokens = drafts.after(self.rows)
        ready, self.ready = self.ready.get(size_of(tokens.shape[1])), {}
        logits = None if ready is None else ready.run(tokens)
        if logits is not None:
            return logits
        return self.directly(tokens.to(self.unfinished.device, non_blocking=True))

    def with_padding(self, drafts: Drafts) -> Drafts:
        """Return drafts with padding in the rows that have ended, where these are padded."""
        if self._padding is None or self.ends is not None:
            return drafts
        if not self._knows(drafts):
            return replace(drafts, tokens=self.padded(drafts.tokens))
        rows = zip(drafts.listed, self._text.going, strict=True)
        kept = [row if on else [self._padding] * drafts.count for row, on in rows]
        return Drafts.on_host(kept, drafts.kind, drafts.chance)

    def _knows(self, drafts: Drafts) -> bool:
        """Return whether the host has the drafts, and the request is its own to accept."""
        return self.by_best and drafts.tokens.device.type == "cpu"
