"""Architectures other than Llama, trained here: similarity, and what skipping costs.

No package is known to ship another small trained decoder, so these are tiny models of bytes,
trained for minutes (seeded) on the source of Python's standard library. They say whether the
method carries over to an architecture, not how well a large model of it would do.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.policies import AdaSkip
from adaskip_fx.policies.adaskip import skip_count

from .quality import costs
from .setup import Options, Subject, Text, library, subject_of
from .similarity import similarity

PICTURES = ("similarity",)
_RANDOM_PLANS = 5


@dataclass(frozen=True)
class Size:
    """How large the models are, and how long they are trained."""

    layers: int
    hidden: int
    heads: int
    steps: int
    batch: int
    context: int


ON_GPU = Size(layers=12, hidden=256, heads=8, steps=800, batch=16, context=512)
ON_CPU = Size(layers=8, hidden=128, heads=4, steps=600, batch=8, context=256)


def _configs(size: Size) -> dict[str, dict[str, Any]]:
    usual = {
        "vocab_size": 256,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    attention = {
        **usual,
        "num_attention_heads": size.heads,
        "max_position_embeddings": 4096,
        "intermediate_size": 4 * size.hidden,
    }
    return {
        "gpt_neox": attention,  # attention and FFN in parallel
        "qwen3": {
            **attention,
            "num_key_value_heads": size.heads // 2,
            "head_dim": size.hidden // size.heads,
        },
        "mamba2": {
            **usual,
            "num_heads": size.heads,
            "head_dim": 2 * size.hidden // size.heads,
            "state_size": 16,
            "n_groups": 1,
            "chunk_size": 32,
        },
    }


#: what is plainly said in the result
_SAID: Mapping[str, str] = MappingProxyType(
    {
        "trained_on": "source of Python's standard library, as bytes",
        "note": "tiny models trained here for minutes; no package ships another trained decoder",
    }
)


def measure(options: Options) -> dict[str, Any]:
    """Train each family, then measure it."""
    on_gpu = torch.cuda.is_available() and options.device != "cpu"
    size = ON_GPU if on_gpu else ON_CPU
    device = torch.device("cuda" if on_gpu else "cpu")
    return {**_SAID, "size": vars(size), "seed": options.seed, **families(options, size, device)}


def families(options: Options, size: Size, device: torch.device) -> dict[str, Any]:
    """Rows as the picture takes them, and costs of skipping by similarity and at random."""
    content = library()
    text = Text("stdlib", content, torch.tensor(list(content.encode()), dtype=torch.int64))
    rows, models, skipping = [], [], []
    for kind, config in _configs(size).items():
        model, losses = train(kind, config, text, size, options.seed, device)
        subject = subject_of(kind, model, None, [text], options, timed=False)
        measured = similarity(subject)
        rows += [{**row, "name": text.name, "family": kind} for row in measured["rows"]]
        models.append({**subject.about()["model"], "last_loss": losses[-1], "losses": losses[::20]})
        skipping += [{"family": kind, **row} for row in _skipping(subject, text)]
    return {"texts": [text.about()], "models": models, "rows": rows, "skipping": skipping}


def train(
    kind: str,
    config: Mapping[str, Any],
    text: Text,
    size: Size,
    seed: int,
    device: torch.device,
) -> tuple[Any, list[float]]:
    """A model in evaluation mode, in float32, and its loss at each step, in nats a byte.

    It reads the first half of the text alone: the second one stays unseen.
    """
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(size.steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 1 - 0.9 * step / size.steps),
    )
    seen = text.tokens[: len(text.tokens) // 2].to(device)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    with torch.enable_grad():
        for _ in range(size.steps):
            starts = torch.randint(len(seen) - size.context, (size.batch,), generator=generator)
            ids = torch.stack([seen[i : i + size.context] for i in starts.tolist()])
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return model.eval().requires_grad_(False), torch.stack(losses).tolist()


def _skipping(subject: Subject, text: Text) -> list[dict[str, Any]]:
    """Perplexity ratio on unseen code: the most similar sublayers, and as many at random."""
    profile, sublayers = subject.profile(text), subject.runtime.sublayers
    chance = random.Random(subject.options.seed)
    plans, about = [], []
    for alpha in subject.options.alphas:
        count = skip_count(alpha, len(sublayers))
        by_similarity = AdaSkip().plan(profile, alpha)
        plans += [by_similarity, *_random(sublayers, count, profile.scales(), chance)]
        about.append((alpha, count, by_similarity))
    full, found = costs(subject.runtime, plans, subject.windows(text, "second"))
    ratios = [cost.against(full)["perplexity_ratio"] for cost in found]
    rows = []
    for i, (alpha, count, plan) in enumerate(about):
        first, *others = ratios[i * (1 + _RANDOM_PLANS) : (i + 1) * (1 + _RANDOM_PLANS)]
        rows.append(
            {
                "alpha": alpha,
                "skipped": count,
                "plan": [str(s) for s in plan.skipped("prefill")],
                "full_perplexity": full.perplexity,
                "perplexity_ratio": first,
                "random_perplexity_ratios": others,
            }
        )
    return rows


def _random(
    sublayers: Sequence[Any], count: int, surrogates: Any, chance: random.Random
) -> list[SkipPlan]:
    plans = (SkipPlan.of(sublayers, chance.sample(sublayers, count)) for _ in range(_RANDOM_PLANS))
    return [plan.with_surrogates(surrogates) for plan in plans]


def summary(result: dict[str, Any]) -> str:
    """What was found, in a few lines."""
    lines = [f"{result['note']} ({result['trained_on']})"]
    for row in result["skipping"]:
        others = sorted(row["random_perplexity_ratios"])
        lines.append(
            f"{row['family']}, {row['skipped']} skipped: perplexity {row['full_perplexity']:.2f} "
            f"a byte, ratio {row['perplexity_ratio']:.3f}; at random {others[0]:.3f} to "
            f"{others[-1]:.3f}"
        )
    shares = {row["family"]: row.get("attention_above_ffn") for row in result["rows"]}
    lines += [
        f"{family}: attention is more similar than FFN in {share:.2f} of all pairs"
        for family, share in shares.items()
        if share is not None
    ]
    return "\n".join(lines)
