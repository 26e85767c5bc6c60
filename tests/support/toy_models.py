"""A tokenizer of words and characters, and models that do what a test says."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adaskip_fx.api import build
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.plans.skip_plan import SkipPlan
from adaskip_fx.plans.sublayer import Sublayer
from adaskip_fx.runtime.runtime import Runtime

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@functools.cache
def tokenizer(template: str | None = None) -> Any:
    """One token a character."""
    known = ["<unk>", "<s>", "</s>", *sorted(string.printable)]
    made = Tokenizer(models.WordLevel({c: i for i, c in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    fast.chat_template = template
    return fast


VOCABULARY = 3 + len(string.printable)


def tiny_llama(layers: int = 2) -> Any:
    """A model for `tokenizer` whose every sublayer matters to the output."""
    torch.manual_seed(layers)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


SUBLAYERS = tuple(Sublayer(layer, kind) for layer in range(2) for kind in ("attention", "ffn"))


@dataclass(frozen=True, eq=False)
class Compiled:
    """A tiny model and the same one compiled, with nothing skipped but inside of `using`."""

    model: Any
    fast: Any

    @property
    def runtime(self) -> Runtime:
        runtime: Runtime = runtime_of(self.fast)
        return runtime

    @contextmanager
    def using(
        self, *skip: str, decode_extra: Sequence[str] = (), policy: Any = None, profile: Any = None
    ) -> Iterator[Any]:
        runtime = self.runtime
        before = runtime.plan, runtime.policy, runtime.profile
        runtime.plan = SkipPlan.of(SUBLAYERS, skip, decode_extra=decode_extra)
        runtime.policy, runtime.profile = policy, profile
        try:
            yield self.fast
        finally:
            runtime.plan, runtime.policy, runtime.profile = before


@functools.cache
def compiled(**options: Any) -> Compiled:
    """One for each way to compile it."""
    model = tiny_llama()
    return Compiled(model, build(model, None, backend="eager", **options))


class Scripted:
    """Says after every prefix what a function says; takes what models take.

    Args:
        following: from the tokens so far to the logits of the next one, [V].
    """

    device, dtype = torch.device("cpu"), torch.float32

    def parameters(self) -> tuple[torch.Tensor, ...]:
        return ()

    def __init__(self, following: Callable[[list[int]], torch.Tensor]) -> None:
        self.following = following
        self.passes: list[tuple[int, int]] = []  # tokens of each pass, and logits asked for

    def forward(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int = 0) -> Any:
        ids = input_ids[0].tolist()
        self.passes.append((len(ids), logits_to_keep))
        first = len(ids) - logits_to_keep if logits_to_keep else 0
        rows = [self.following(ids[: i + 1]) for i in range(first, len(ids))]
        return SimpleNamespace(logits=torch.stack(rows)[None])

    def __call__(self, **arguments: Any) -> Any:
        return self.forward(**arguments)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        max_new_tokens: int,
        do_sample: bool,
    ) -> torch.Tensor:
        assert not do_sample
        assert attention_mask.shape == input_ids.shape
        ids = input_ids[0].tolist()
        for _ in range(max_new_tokens):
            ids.append(int(self.following(ids).argmax()))
            if ids[-1] == tokenizer().eos_token_id:
                break
        return torch.tensor([ids])


def knows(*texts: Sequence[int]) -> Scripted:
    """A model that continues each of these texts from anywhere in it, then ends."""
    stop = tokenizer().eos_token_id
    known = [list(t) for t in texts]

    def following(ids: list[int]) -> torch.Tensor:
        logits = torch.zeros(VOCABULARY)
        nexts = (t[len(ids)] for t in known if len(t) > len(ids) and t[: len(ids)] == ids)
        logits[next(nexts, stop)] = 10.0
        return logits

    return Scripted(following)


def says(character: str) -> Scripted:
    """A broken model: it always says the same."""
    (token,) = tokenizer()(character, add_special_tokens=False)["input_ids"]

    def following(ids: list[int]) -> torch.Tensor:
        logits = torch.zeros(VOCABULARY)
        logits[token] = 10.0
        return logits

    return Scripted(following)


def encoded(text: str) -> tuple[int, ...]:
    return tuple(tokenizer()(text, add_special_tokens=False)["input_ids"])
