"""What all situations share: the models, lengths, requests, and how something is timed."""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaskip_fx.plans.skip_plan import SkipPlan

from .. import models
from ..ceilings import MatrixRate, copy_rate, seconds


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens, and how often something is done.

    Attributes:
        short, long, longest: Of prompts; the longest leaves room in a model of 131,072 positions.
        compared: Of a prompt whose logits are compared with the eager model's.
        chunk: Of a prompt that is read in pieces.
        turn: New tokens on a filled cache.
        steps: Decode steps, or other calls, that are timed in one block.
        rounds: How often a block is timed.
        generated: Tokens that `generate` makes.
        first, apart: Length of the first of ten prompts, and the difference to the next.
        begun, decoded: Prompt of a request whose cache grows, and its decoded tokens.
        room: Tokens that a request may have at most that ends early.
        new_plans: How many plans are tried that are new.
    """

    short: int
    long: int
    longest: int
    compared: int
    chunk: int
    turn: int
    steps: int
    rounds: int
    generated: int
    first: int
    apart: int
    begun: int
    decoded: int
    room: int
    new_plans: int


ON_GPU = Sizes(
    **{"short": 8192, "long": 32768, "longest": 131072 - 256, "compared": 64},
    **{"chunk": 4096, "turn": 512, "steps": 32, "rounds": 3, "generated": 64},
    **{"first": 1000, "apart": 799, "begun": 1000, "decoded": 600, "room": 131072},
    new_plans=6,
)
TINY = Sizes(
    **{"short": 128, "long": 256, "longest": 512, "compared": 32},
    **{"chunk": 32, "turn": 16, "steps": 4, "rounds": 2, "generated": 4},
    **{"first": 40, "apart": 9, "begun": 240, "decoded": 30, "room": 1024},
    new_plans=3,
)
#: Relative error of logits against the eager model's that is always allowed: 8 bits of each value
#: in bfloat16, 24 in float32, and the sums of many layers.
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-4}


class Bench:
    """The eager model, the compiled one, and the card's rates.

    Attributes:
        model, fast: The same weights, eager and compiled.
        plan: Nothing is skipped.
        sizes: Of this device.
    """

    def __init__(self, pair: tuple[Any, Any] | None = None) -> None:
        """Take a model and the same compiled; those of `models.pair` without."""
        self.device = models.device()
        self.model, self.fast = pair or models.pair()
        self.plan = SkipPlan.empty(self.fast.adaskip.sublayers)
        self.sizes = ON_GPU if self.device.type == "cuda" else TINY

    def begin(self) -> None:
        """Have nothing left of the situation before: neither its plan nor its memory."""
        self.fast.adaskip.plan = self.plan
        gc.collect()
        self.fast.adaskip.free()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # Rates ---------------------------------------------------------------------------------------

    @functools.cached_property
    def products(self) -> MatrixRate:
        """Matrix products, whose rate prompts are measured by."""
        return MatrixRate(self.device, self.model.dtype)

    def copy_rate(self) -> float:
        """Return the bytes that are copied in a second now."""
        return copy_rate(self.device)

    # Requests ------------------------------------------------------------------------------------

    def filled(self, ids: torch.Tensor, mask: torch.Tensor | None = None, room: int = 128) -> Any:
        """Return the cache of a request that has read the prompt `ids`, with room for more."""
        cache = self.fast.adaskip.new_cache(capacity=ids.shape[1] + room)
        given = {} if mask is None else {"attention_mask": mask, "position_ids": positions(mask)}
        self.fast(input_ids=ids, past_key_values=cache, logits_to_keep=1, **given)
        return cache

    def steps(self, cache: Any, mask: torch.Tensor | None = None) -> Callable[[], None]:
        """Return what decodes a block of tokens on a filled cache, and takes them back first.

        Steps are begun one after another, and nothing is read on the host. A padded step gets the
        mask and the positions that ``generate`` gives it, made beforehand.
        """
        length, rows = cache.length, cache.batch
        given: list[dict[str, Any]] = [{}] * self.sizes.steps
        if mask is not None:
            given = [step_inputs(mask, step) for step in range(self.sizes.steps)]
        token = models.tokens(rows, 1)

        def block() -> None:
            cache.keep_first(length)
            for one in given:
                self.fast(input_ids=token, past_key_values=cache, **one)

        return block

    def step_seconds(self, cache: Any, mask: torch.Tensor | None = None) -> float:
        """Return the median seconds of a decode step in blocks of them."""
        times = seconds(self.steps(cache, mask), self.device, self.sizes.rounds, 1)
        return statistics.median(times) / self.sizes.steps

    # Times ---------------------------------------------------------------------------------------

    def times(
        self, runs: Mapping[str, Callable[[], Any]], warmup: int = 0, settle: int = 0
    ) -> tuple[dict[str, float], float]:
        """Return the median seconds of each of `runs`, which take turns with matrix products.

        A GPU's clock falls under load, and differently from one minute to the next.

        Args:
            runs: By name; each runs once before all that is timed.
            warmup: How often each runs before it is timed, in every round.
            settle: How often each runs before all of it: attention of a shape is planned when the
                shape has come often enough.

        Returns:
            The seconds by name, and the rate of the products in operations a second.
        """
        took: dict[str, list[float]] = {name: [] for name in runs}
        rates = []
        for run in runs.values():
            for _ in range(settle):
                run()
        for turn in range(1 + self.sizes.rounds):
            rate = self.products.sustained()
            rates += [rate] if turn else []
            for name, run in runs.items():
                (one,) = seconds(run, self.device, 1, warmup)
                if turn:
                    took[name].append(one)
        return {name: statistics.median(t) for name, t in took.items()}, statistics.median(rates)

    @functools.cached_property
    def tolerance(self) -> float:
        """The relative error of logits that is allowed: twice that of other kernels of PyTorch's.

        The eager model is run with written out attention and with fused kernels.
        """
        ids = models.tokens(1, self.sizes.compared)
        with torch.inference_mode():
            with sdpa_kernel(SDPBackend.MATH):
                plain = self.model(input_ids=ids, use_cache=False).logits
            fused = self.model(input_ids=ids, use_cache=False).logits
        return max(TOLERANCE[self.model.dtype], 2 * relative_error(fused, plain))

    # Right? --------------------------------------------------------------------------------------

    def eager_error(
        self,
        pieces: Sequence[int],
        mask: torch.Tensor | None = None,
        keep: int = 1,
    ) -> float:
        """Return the relative error of the last piece's logits against the eager model's.

        Args:
            pieces: How many tokens of a random text the compiled model reads at once, in turn; the
                eager one reads all of them in one go, without a cache.
            mask: Int64 [B, all tokens], 0 at padding; one row without.
            keep: ``logits_to_keep`` of the last piece.
        """
        ids = models.tokens(1 if mask is None else mask.shape[0], sum(pieces))
        cache, done, logits = self.fast.adaskip.new_cache(), 0, None
        for i, count in enumerate(pieces):
            end, given = done + count, dict[str, Any]()
            if mask is not None:
                given = {
                    "attention_mask": mask[:, :end].contiguous(),
                    "position_ids": positions(mask)[:, done:end].contiguous(),
                }
            kept = keep if i == len(pieces) - 1 else 1
            logits = self.fast(
                input_ids=ids[:, done:end], past_key_values=cache, logits_to_keep=kept, **given
            ).logits
            done = end
        assert logits is not None
        padded = {} if mask is None else {"attention_mask": mask, "position_ids": positions(mask)}
        expected = self.model(input_ids=ids, use_cache=False, **padded).logits
        return relative_error(logits, expected[:, -logits.shape[1] :])


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over that of what is expected."""
    wanted = expected.float()
    return float((logits.float() - wanted).norm() / wanted.norm())


def left_padded(context: int, shares: Sequence[float]) -> torch.Tensor:
    """Return a mask int64 [rows, context] whose rows have these shares of padding on the left."""
    columns = torch.arange(context, device=models.device())
    begins = torch.tensor([round(context * share) for share in shares], device=models.device())
    return (columns >= begins.unsqueeze(1)).to(torch.int64)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Return position_ids int64 of a mask's columns, as ``generate`` gives them."""
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)


def step_inputs(mask: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
    """Return mask and positions of a decode step, `step` tokens after the prompt of `mask`."""
    new = mask.new_ones(mask.shape[0], step + 1)
    whole = torch.cat((mask, new), 1)
    return {"attention_mask": whole, "position_ids": positions(whole)[:, -1:].contiguous()}


def real_lengths(mask: torch.Tensor) -> list[int]:
    """Return how many tokens of each row are none of padding."""
    return [int(n) for n in mask.sum(1).tolist()]
