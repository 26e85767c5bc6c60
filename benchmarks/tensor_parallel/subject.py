"""What is measured: a shape with random weights, as transformers shards it and compiled."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from adaskip_fx.api import build
from adaskip_fx.plans.skip_plan import SkipPlan

from .. import models
from . import processes

_70B = {
    **models.LLAMA_8B,
    **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
    "num_attention_heads": 64,
}
#: Of the memory that is free, so much may be weights and the K/V of two requests.
_SHARE = 0.8


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens, and how often something is done.

    Attributes:
        prompt: Of the prompt that is timed.
        contexts: Tokens that are stored where steps are timed.
        compared: Of a prompt whose logits are compared.
        steps: Decode steps in a block.
        rounds: How often something is timed.
        new_plans: How many plans are tried that are new.
    """

    prompt: int
    contexts: tuple[int, ...]
    compared: int
    steps: int
    rounds: int
    new_plans: int


ON_GPU = Sizes(32768, (8192, 32768), 64, 32, 3, 6)
TINY = Sizes(48, (16, 32), 16, 3, 2, 2)


@dataclass(frozen=True)
class Shape:
    """A shape of a model.

    Attributes:
        on_gpu: Arguments of its config; a tiny model takes its place without a GPU.
        compared_layers: How many layers a smaller model of it has, whose logits are compared.
    """

    on_gpu: dict[str, Any]
    compared_layers: int = 16

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the config on this device."""
        return self.on_gpu if models.device().type == "cuda" else {**models.TINY, **_FEW}

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return int(self.config["num_hidden_layers"])

    def fitting(self, tokens: int) -> int:
        """Return how many layers fit, with the K/V of two requests of so many tokens."""
        if models.device().type != "cuda":
            return self.layers
        given = self.config
        hidden, width = given["hidden_size"], given["intermediate_size"]
        kv = hidden * given["num_key_value_heads"] // given["num_attention_heads"]
        weights = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * width
        a_layer = 2 * (weights + 2 * 2 * kv * tokens) / processes.count()
        ends = 2 * 2 * given["vocab_size"] * hidden
        free = -processes.largest(-float(torch.cuda.mem_get_info()[0]))
        return max(1, min(self.layers, int((_SHARE * free - ends) / a_layer)))


_FEW = {"num_hidden_layers": 4}
SHAPES = {"8B": Shape(models.LLAMA_8B), "70B": Shape(_70B, 2)}


class Subject:
    """A model on all ranks, and the same compiled.

    Attributes:
        model, fast: The same weights, as transformers runs them and compiled.
        plan: Nothing is skipped.
        sizes: Of this device.
        layers: How many there are.
    """

    def __init__(self, name: str, model: Any) -> None:
        """Compile `model`, which has the shape of that name."""
        self.name, self.model = name, model
        self.device = models.device()
        on_gpu = self.device.type == "cuda"
        self.sizes = ON_GPU if on_gpu else TINY
        backend = "inductor" if on_gpu else "eager"
        self.fast: Any = build(model, None, backend=backend)
        self.plan = SkipPlan.empty(self.fast.adaskip.sublayers)
        self.layers: int = model.config.num_hidden_layers

    @classmethod
    def of(cls, name: str) -> Subject:
        """Return the shape of that name, with as many layers as fit."""
        sizes = ON_GPU if models.device().type == "cuda" else TINY
        shape = SHAPES[name]
        return cls(name, sharded(shape.config, shape.fitting(sizes.prompt)))

    def begin(self) -> None:
        """Have nothing left of the part before: neither its plan nor its memory."""
        self.fast.adaskip.plan = self.plan
        gc.collect()
        self.fast.adaskip.free()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Let go of the model, whose memory the next shape needs."""
        self.fast = self.model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # Requests ------------------------------------------------------------------------------------

    def filled(self, tokens: int) -> Any:
        """Return the cache of a compiled request that has read so many tokens."""
        cache = self.fast.adaskip.new_cache(capacity=tokens + 2 * self.sizes.steps + 8)
        self.fast(input_ids=ids(tokens), past_key_values=cache, logits_to_keep=1)
        return cache

    def block(self, cache: Any) -> Callable[[], None]:
        """Return what decodes a block of tokens on a filled cache, and takes them back first."""
        length, token = cache.length, ids(1)

        def run() -> None:
            cache.keep_first(length)
            for _ in range(self.sizes.steps):
                self.fast(input_ids=token, past_key_values=cache)

        return run

    def step_seconds(self, tokens: int) -> float:
        """Return the seconds of a compiled decode step on so many tokens."""
        block = self.block(self.filled(tokens))
        return processes.seconds(block, self.sizes.rounds) / self.sizes.steps

    def their_step_seconds(self, tokens: int) -> float:
        """Return the seconds of a decode step of transformers' own, on its DynamicCache."""
        cache, token = DynamicCache(config=self.model.config), ids(1)
        self._theirs(ids(tokens), cache)
        took = processes.seconds(lambda: self._theirs(token, cache), 2 * self.sizes.rounds)
        return took

    def prompt_seconds(self, tokens: int) -> float:
        """Return the seconds of a compiled prompt, logits for its last token."""
        text = ids(tokens)

        def run() -> None:
            cache = self.fast.adaskip.new_cache(capacity=tokens)
            self.fast(input_ids=text, past_key_values=cache, logits_to_keep=1)

        return processes.seconds(run, self.sizes.rounds, warmup=2)

    def their_prompt_seconds(self, tokens: int) -> float:
        """Return the seconds of a prompt of transformers' own."""
        text, config = ids(tokens), self.model.config
        return processes.seconds(
            lambda: self._theirs(text, DynamicCache(config=config)), self.sizes.rounds
        )

    def _theirs(self, new: torch.Tensor, cache: Any) -> None:
        self.model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)


def ids(count: int) -> torch.Tensor:
    """Return random ids int64 [1, count], the same on all ranks."""
    drawn = torch.randint(0, 250, (1, count), generator=torch.Generator().manual_seed(count))
    return drawn.to(models.device())


def sharded(shape: dict[str, Any], layers: int) -> Any:
    """Return a model with random weights, of which each rank has made its own."""
    given = {**shape, "num_hidden_layers": layers, "eos_token_id": None, "pad_token_id": None}
    if processes.count() == 1:
        return models.llama(**given)
    from transformers.distributed import DistributedConfig

    config = LlamaConfig(**given)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    torch.manual_seed(0)
    said = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # of every weight that no file has
    try:
        model = LlamaForCausalLM.from_pretrained(
            None,
            config=config,
            state_dict={},
            dtype=torch.bfloat16 if models.device().type == "cuda" else torch.float32,
            distributed_config=DistributedConfig(tp_size=processes.count()),
        )
    finally:
        transformers.logging.set_verbosity(said)
    return model.eval().requires_grad_(False)
