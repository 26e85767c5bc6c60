"""How long must a window be to know what the rest of a request says? (The paper's Table 2.)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from adaskip_fx.plans.skip_plan import SkipPlan, Sublayer
from adaskip_fx.policies import AdaSkip
from adaskip_fx.profiles.profile import PROBE_STATS, Profile

from .setup import Options, Subject, open_subject
from .stats import hit_rate

PICTURES = ("window",)
SIZES = (5, 10, 20, 40, 80)
_REST = 200  # decoded tokens after the longest window
_SHORT_REST = 40  # on a CPU
_LEAST = 4  # ffn sublayers of a ranking, where beta lets fewer pass
Array = npt.NDArray[np.float64]


def measure(options: Options) -> dict[str, Any]:
    """Hit rates of P = 5 to 80 on every text, at the last alpha that was asked for."""
    subject = open_subject(options, timed=True)
    rest = _REST if subject.device.type == "cuda" else _SHORT_REST
    sizes = SIZES if subject.device.type == "cuda" else SIZES[:4]
    return {**subject.about(), **windows(subject, sizes, rest)}


def windows(subject: Subject, sizes: Sequence[int], rest: int) -> dict[str, Any]:
    """Rows as the picture takes them, against the rest of the request.

    ``rows_whole``: the same against the whole request, the window itself included, which is
    kinder to long windows.
    """
    alpha = subject.options.alphas[-1]
    found: dict[str, list[dict[str, Any]]] = {"rows": [], "rows_whole": []}
    for text in subject.texts:
        profile = subject.profile(text)
        plan = AdaSkip().plan(profile, alpha)
        requests = [
            _decode(subject, profile, plan, prompt, sizes, rest)
            for prompt in subject.windows(text, "second")
        ]
        for key, target in (("rows", "rest"), ("rows_whole", "whole")):
            found[key] += [
                {"text": text.name, **_averaged([r.compare(p, target) for r in requests], p)}
                for p in sizes
            ]
    return {
        "alpha": alpha,
        "decoded": sizes[-1] + rest,
        "decoding": "sampled from the model at temperature 1, seeded",
        "target": f"the {rest} tokens after the longest window",
        **found,
    }


@dataclass(frozen=True)
class Decoded:
    """Moments of one request's ffn sublayers while decoding.

    Attributes:
        sums: by decoded tokens so far, [probed, 5].
        probed: the ffn sublayers that ran.
        profile, plan: what decides.
        longest, total: the longest window, and all decoded tokens.
    """

    sums: dict[int, Array]
    probed: tuple[Sublayer, ...]
    profile: Profile
    plan: SkipPlan
    longest: int
    total: int

    def compare(self, size: int, target: str) -> dict[str, float | int | None]:
        """The window's choice against that of the ``"rest"`` of the request, or of the ``"whole"``.

        hit_rate: of the m most similar ffn, by the window, the share that is among the m most
        similar by the target; m is how many pass beta there, at least 4. precision, recall: of the
        sets that pass beta.
        """
        right = self.sums[self.total]
        if target == "rest":
            right = right - self.sums[self.longest]
        chosen, truth = self.added(self.sums[size]), self.added(right)
        most = min(max(len(truth), _LEAST), len(self.probed))
        return {
            "hit_rate": hit_rate(self.top(self.sums[size], most), self.top(right, most)),
            "precision": hit_rate(chosen, truth),
            "recall": hit_rate(truth, chosen),
            "added": len(chosen),
            "right": len(truth),
        }

    def added(self, moments: Array) -> set[Sublayer]:
        """What the online step adds."""
        learned = AdaSkip().online_plan(self.profile, self.plan, moments, self.probed)
        return set(learned.decode) - set(self.plan.decode)

    def top(self, moments: Array, count: int) -> set[Sublayer]:
        similarity = (
            moments[:, PROBE_STATS.index("cosine")] / moments[:, PROBE_STATS.index("tokens")]
        )
        return {self.probed[i] for i in np.argsort(-similarity, kind="stable")[:count]}


def _decode(
    subject: Subject,
    profile: Profile,
    plan: SkipPlan,
    prompt: torch.Tensor,
    sizes: Sequence[int],
    rest: int,
) -> Decoded:
    """Decode with a window that never closes, and read it at each of `sizes` and at the end."""
    runtime, total = subject.runtime, sizes[-1] + rest
    before = runtime.policy, runtime.profile
    runtime.policy, runtime.profile = AdaSkip(window=total + 1), profile
    generator = torch.Generator(subject.device).manual_seed(subject.options.seed)
    sums = {}
    try:
        cache = runtime.new_cache(prompt.shape[1] + total + 1, plan=plan)
        logits = runtime.step(prompt, None, None, cache, 1)
        for done in range(1, total + 1):
            logits = runtime.step(_sample(logits, generator), None, None, cache, 1)
            window = cache.request.window
            if window is None:
                raise ValueError(f"nothing is skipped at this alpha: {plan}")
            if done in (*sizes, total):
                sums[done] = window.read()
        return Decoded(sums, window.probed, profile, plan, sizes[-1], total)
    finally:
        runtime.policy, runtime.profile = before


def _sample(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token int64 [1, 1] of logits [1, 1, V]."""
    return torch.multinomial(logits[0, -1:].float().softmax(-1), 1, generator=generator)


def _averaged(
    found: Sequence[dict[str, float | int | None]], size: int
) -> dict[str, float | int | None]:
    """Means over the requests that have a value."""
    means: dict[str, float | int | None] = {"window": size, "requests": len(found)}
    for key in found[0]:
        values = [float(v) for one in found if (v := one[key]) is not None]
        means[key] = float(np.mean(values)) if values else None
    return means


def summary(result: dict[str, Any]) -> str:
    """What was found, in a few lines."""

    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    return "\n".join(
        f"{row['text']}, P = {row['window']}: hit rate {text(row['hit_rate'])}, precision "
        f"{text(row['precision'])}, recall {text(row['recall'])}, adds {text(row['added'])} where "
        f"{text(row['right'])} are right"
        for row in result["rows"]
    )
