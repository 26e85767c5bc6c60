"""A choice among groups of experts by token in float64: what `choose_in_groups` must give."""

from __future__ import annotations

import math

import torch


def chosen_in_groups(
    logits: torch.Tensor,
    bias: torch.Tensor,
    count: int,
    groups: int,
    kept: int,
    share: bool,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Affinities in float64 and places [T, count], in descending order of what is compared."""
    values, places = [], []
    size = logits.shape[1] // groups
    for row in logits.double().tolist():
        affinities = [1 / (1 + math.exp(-logit)) for logit in row]
        compared = [a + b for a, b in zip(affinities, bias.double().tolist(), strict=True)]
        totals = [
            sum(sorted(compared[g * size : (g + 1) * size], reverse=True)[:2])
            for g in range(groups)
        ]
        best = sorted(range(groups), key=lambda g: -totals[g])[:kept]
        among = [place for place in range(len(row)) if place // size in best]
        chosen = sorted(among, key=lambda place: -compared[place])[:count]
        mass = sum(affinities[place] for place in chosen) if share else 1.0
        values.append([affinities[place] / mass * factor for place in chosen])
        places.append(chosen)
    return torch.tensor(values, dtype=torch.float64), torch.tensor(places)
