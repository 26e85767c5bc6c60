"""A few plans, one by the prompt, as PuDDing (arXiv 2502.04348) and FiRST choose them.

Where the papers train a small network to choose, here the nearest centroid does: `learn_routes`
measures kinds of prompts, the policy `Router` makes a plan for each, and a `Choice` takes one by a
request's first prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from ..calibration.calibrate import calibrate, unmasked
from ..plans.decision_files import register_kind
from ..plans.decisions import PlanChooser, check_same_model, left_out
from ..plans.skip_plan import PlanError, SkipPlan
from ..policies.adaskip import AdaSkip
from ..policies.base import check_policy, for_its_model
from ..utils.files import JSON, canonical_digest

if TYPE_CHECKING:
    from ..policies import PlanPolicy
    from ..profiles.profile import Profile


@dataclass(frozen=True)
class Option:
    """One of the plans of a `Choice`, and where in the space of prompts it belongs.

    Attributes:
        name: What it is called in reports.
        plan: The plan.
        centroid: [H], the mean input embedding of prompts that the plan is for; only its direction
            counts.

    Raises:
        PlanError: The centroid is empty, zero or not finite.
    """

    name: str
    plan: SkipPlan
    centroid: tuple[float, ...]

    def __post_init__(self) -> None:
        centroid = tuple(map(float, self.centroid))
        object.__setattr__(self, "centroid", centroid)
        if not (all(map(math.isfinite, centroid)) and any(centroid)):
            raise PlanError(f"option {self.name}: a centroid is finite and not zero")


@dataclass(frozen=True)
class Choice(PlanChooser):
    """A few plans, of which a request takes one by its first prompt and keeps it.

    The one whose centroid makes the smallest angle with the mean input embedding of the prompt's
    tokens, padding left out; ties go to the first. A batch takes one plan: the mean is over rows,
    each row counting the same.

    Attributes:
        options: The plans.

    Raises:
        PlanError: There are no options, a name is used twice, the plans are of different models, or
            the centroids of different widths.
    """

    options: tuple[Option, ...]
    kind: ClassVar[str] = "choice"

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(self.options))
        _check_names(self.kind, [option.name for option in self.options])
        check_same_model(self.kind, self.plans)
        widths = {len(option.centroid) for option in self.options}
        if len(widths) > 1:
            raise PlanError(f"the centroids of a choice have different widths: {sorted(widths)}")

    @property
    def plans(self) -> tuple[SkipPlan, ...]:
        """The plan of every option, in order."""
        return tuple(option.plan for option in self.options)

    def with_plans(self, plans: Sequence[SkipPlan]) -> Choice:
        """Return the same options with other plans."""
        return Choice(tuple(replace(o, plan=p) for o, p in zip(self.options, plans, strict=True)))

    def to_entries(self) -> list[dict[str, JSON]]:
        """Return the name and the centroid of each option."""
        return [{"name": o.name, "centroid": list(o.centroid)} for o in self.options]

    @classmethod
    def from_entries(cls, entries: Sequence[tuple[SkipPlan, Mapping[str, Any]]]) -> Choice:
        """Return the choice that was saved."""
        return cls(tuple(Option(e["name"], plan, e["centroid"]) for plan, e in entries))

    def rows(self) -> list[tuple[str, SkipPlan]]:
        """Return each plan with the name of its option."""
        return [(option.name, option.plan) for option in self.options]

    def choose(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> SkipPlan:
        """Return the plan of the option that is nearest to a prompt int64 [B, T]."""
        return self.nearest(mean_embedding(model, input_ids, attention_mask).cpu().numpy()).plan

    def nearest(self, embedding: npt.ArrayLike) -> Option:
        """Return the option for a prompt with mean input embedding `embedding` [H].

        Raises:
            ValueError: It has another width: the choice was made for another model.
        """
        prompt = np.asarray(embedding, dtype=np.float64)
        centroids = np.array([option.centroid for option in self.options])
        if prompt.shape != centroids.shape[1:]:
            raise ValueError(
                f"the prompt's embedding has shape {list(prompt.shape)}, the centroids are "
                f"{centroids.shape[1]} wide: this choice was made for another model"
            )
        cosine = centroids @ prompt / np.linalg.norm(centroids, axis=1)  # times the prompt's norm
        return self.options[int(np.argmax(cosine))]

    @cached_property
    def digest(self) -> str:
        """16 hex characters that identify the options."""
        return canonical_digest([[o.name, o.plan.digest, list(o.centroid)] for o in self.options])

    def __str__(self) -> str:
        """Return a heading and one row per option, plain text."""
        heading = f"Choice {self.digest[:8]}: {len(self.options)} plans, one by the first prompt"
        return "\n".join([heading, *(f"{o.name}: {left_out(o.plan)}" for o in self.options)])


register_kind(Choice)


def _check_names(kind: str, names: Sequence[str]) -> None:
    if not names:
        raise PlanError(f"a {kind} needs at least one plan, got none")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise PlanError(f"a {kind} names {twice[0]!r} twice; give every plan its own name")


@dataclass(frozen=True)
class Route:
    """One kind of prompts: its name, what was measured on it, and its mean input embedding.

    `learn_routes` makes them from sets of texts.

    Attributes:
        name: What it is called in reports.
        profile: What was measured on such prompts.
        centroid: [H], the mean of their mean input embeddings.
    """

    name: str
    profile: Profile
    centroid: tuple[float, ...]


@dataclass(frozen=True)
class Router:
    """For each kind of prompts the plan that another policy makes of what was measured on it.

    Attributes:
        routes: The kinds of prompts.
        policy: It makes the plans; nothing is learned while decoding.

    Raises:
        ValueError: There are no routes, or (when it plans) a profile is of another model.
    """

    routes: tuple[Route, ...]
    policy: PlanPolicy = field(default_factory=AdaSkip)

    def __post_init__(self) -> None:
        if not self.routes:
            raise ValueError("Router: no routes were given; learn_routes makes them from texts")

    def check(self, model: Any) -> None:
        """Refuse what `policy` refuses."""
        check_policy(self.policy, model)

    @for_its_model
    def plan(self, profile: Profile, alpha: float) -> Choice:
        """Return the plans at `alpha`; of `profile` only its model counts."""
        for route in self.routes:
            if route.profile.fingerprint.digest != profile.fingerprint.digest:
                raise ValueError(
                    f"route {route.name} was measured on {route.profile.fingerprint}, but the "
                    f"model is {profile.fingerprint}; learn the routes on this model"
                )
        return Choice(
            tuple(
                Option(r.name, self.policy.plan(r.profile, alpha), r.centroid) for r in self.routes
            )
        )


def learn_routes(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    max_length: int = 2048,
    *,
    backend: str = "eager",
) -> tuple[Route, ...]:
    """Return a route for each named set of texts, which stand for a kind of prompts.

    Args:
        model: A transformers decoder.
        tokenizer: The model's.
        texts: By name; a set's centroid is the mean of its texts' mean input embeddings.
        max_length: Tokens that are read of a text.
        backend: The torch.compile backend that `adaskip_fx.calibrate` measures with.

    Raises:
        ValueError: There are no sets; and what `calibrate` raises.
    """
    if not texts:
        raise ValueError("no texts were given; name a set of texts for each kind of prompts")
    return tuple(
        Route(
            name,
            calibrate(model, tokenizer, of_kind, max_length, backend=backend),
            tuple(_centroid(model, tokenizer, of_kind, max_length).tolist()),
        )
        for name, of_kind in texts.items()
    )


def _centroid(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int) -> torch.Tensor:
    options = {"truncation": True, "max_length": max_length, "return_tensors": "pt"}
    ids = (unmasked(tokenizer(text, **options)).to(model.device) for text in texts)
    return torch.stack([mean_embedding(model, tokens) for tokens in ids]).mean(0)


_CHUNK = 1024  # tokens that are embedded at once: float32 is twice a model's own width


@torch.no_grad()
def mean_embedding(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the mean input embedding [H] of a prompt, float32 on the device.

    Of a batch it is the mean over each row's tokens, padding left out, then over rows.

    Args:
        model: A transformers decoder.
        input_ids: int64 [B, T].
        attention_mask: [B, T], 0 at padding.
    """
    embed = model.get_input_embeddings()
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    weights = valid.to(torch.float32)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1.0)
    total: torch.Tensor | None = None
    for ids, share in zip(
        torch.split(input_ids, _CHUNK, 1), torch.split(weights, _CHUNK, 1), strict=True
    ):
        part = torch.einsum("bt,bth->h", share, embed(ids).to(torch.float32))
        total = part if total is None else total + part
    assert total is not None
    return total / input_ids.shape[0]
