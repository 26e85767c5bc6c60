"""A policy of your own: skip the most similar sublayers, but never two neighbours.

python examples/own_policy.py MODEL TEXT
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

import adaskip_fx


@dataclass(frozen=True)
class Apart:
    """The most similar sublayers, of which no two follow each other in the stream."""

    def plan(self, profile: adaskip_fx.Profile, alpha: float) -> adaskip_fx.SkipPlan:
        """Return a plan that skips as many as AdaSkip does at `alpha`, or as many as there are."""
        wanted = math.floor(len(profile.sublayers) * (1 - 1 / alpha) + 1 / 2)
        chosen: set[int] = set()
        for i in map(int, np.argsort(-profile.similarity(), kind="stable")):
            if len(chosen) == wanted:
                break
            if not {i - 1, i + 1} & chosen:
                chosen.add(i)
        skip = [profile.sublayers[i] for i in sorted(chosen)]
        return adaskip_fx.SkipPlan.of(profile.sublayers, skip, surrogates=profile.scales())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--alpha", type=float, default=1.3)
    parser.add_argument("--backend", default="inductor")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    text = options.text.read_text(encoding="utf-8")
    profile = adaskip_fx.calibrate(model, tokenizer, [text], max_length=512)
    fast = adaskip_fx.compile(
        model, profile, options.alpha, policy=Apart(), backend=options.backend
    )
    print(fast.adaskip.plan)


if __name__ == "__main__":
    main()
