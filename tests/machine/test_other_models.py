"""Random sequences of calls on models that are more than a decoder with a language-model head.

Three small machines beside the large one (`test_state_machine`): a model of vision and language, a
classifier, and a model of peft's. What each must give is the eager model's answer; of images that
of an eager model of its own for each request, since such models keep positions on themselves.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, ClassVar

import pytest
import torch
import transformers
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from adaskip_fx import UnsupportedError
from adaskip_fx.api import build
from adaskip_fx.model import host
from tests.support import adapters, images
from tests.support.eager_reference import assert_close, cache_name

SOAK = settings().max_examples > 100
TOKENS = st.integers(3, 50)
WHICH = st.integers(0, 5)


def run(machine: type[RuleBasedStateMachine]) -> None:
    """Draw sequences; the same ones each time, but in a soak."""
    few = {"max_examples": 60 if SOAK else 8, "stateful_step_count": 20 if SOAK else 10}
    phases = [p for p in Phase if p is not Phase.explain]
    run_state_machine_as_test(
        machine, settings=settings(**few, derandomize=not SOAK, deadline=None, phases=phases)
    )


# Images -----------------------------------------------------------------------------------------


@functools.cache
def with_images(kind: str) -> Any:
    return build(images.made(kind), None, backend="eager")


class Talk:
    """A request, of the compiled model and of an eager one that has seen nothing else."""

    def __init__(self, compiled: Any, eager: Any, given: dict[str, Any]) -> None:
        self.models, self.name = (compiled, eager), cache_name(eager.forward)
        self.ids = given["input_ids"]
        outputs = [model(**given, use_cache=True) for model in self.models]
        self.caches = [output[self.name] for output in outputs]
        assert_close(outputs[0].logits, outputs[1].logits, 1e-4, "a prompt")

    def decode(self, token: int) -> None:
        new = torch.tensor([[token]])
        held = [{self.name: cache, "use_cache": True} for cache in self.caches]
        pairs = zip(self.models, held, strict=True)
        logits = [model(input_ids=new, **more).logits for model, more in pairs]
        assert_close(*logits, 1e-4, "a decoded token")
        self.ids = torch.cat((self.ids, new), 1)

    def generate(self, token: int) -> None:
        ids = torch.cat((self.ids, torch.tensor([[token]])), 1)
        more = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
        pairs = zip(self.models, self.caches, strict=True)
        texts = [model.generate(ids, **more, **{self.name: cache}) for model, cache in pairs]
        assert torch.equal(*texts)
        self.ids = texts[0][:, :-1]  # the last one is not stored


class Images(RuleBasedStateMachine):
    """Requests with and without an image, which take turns."""

    kind: ClassVar[str] = "qwen"

    def __init__(self) -> None:
        super().__init__()
        self.talks: list[Talk] = []

    @rule(image=st.booleans(), token=TOKENS)
    @torch.no_grad()
    def begin(self, image: bool, token: int) -> None:
        given: dict[str, Any] = {"input_ids": torch.tensor([[5, token, 9, 3]])}
        if image:
            given = images.prompt(self.kind)
            del given["attention_mask"]
            given["input_ids"][0, -1] = token
        self.talks = [*self.talks[-2:], Talk(with_images(self.kind), images.made(self.kind), given)]

    @rule(which=WHICH, token=TOKENS)
    @torch.no_grad()
    def decode(self, which: int, token: int) -> None:
        for talk in self.talks[which % 3 : which % 3 + 1]:
            talk.decode(token)

    @rule(which=WHICH, token=TOKENS)
    def generate(self, which: int, token: int) -> None:
        for talk in self.talks[which % 3 : which % 3 + 1]:
            talk.generate(token)

    @rule(which=WHICH)
    def copied(self, which: int) -> None:
        for talk in self.talks[which % 3 : which % 3 + 1]:
            twin = copy.copy(talk)
            twin.models = (talk.models[0], copy.deepcopy(talk.models[1]))
            twin.caches = [*map(copy.deepcopy, talk.caches)]
            self.talks = [*self.talks[-2:], twin]


class Llava(Images):
    """Its positions are counted."""

    kind = "llava"


@pytest.mark.parametrize(
    "machine", [Images, pytest.param(Llava, marks=pytest.mark.slow)], ids=["qwen", "llava"]
)
def test_any_requests_of_images(machine: type[Images]) -> None:
    run(machine)


@pytest.mark.breaks
def test_positions_of_another_request_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: they are where the last request has left them."""
    monkeypatch.setattr(host, "recall_offsets", lambda model, path, offsets: None)
    machine = Images()
    machine.begin(True, 7)
    machine.begin(False, 7)
    with pytest.raises(AssertionError, match="a decoded token: relative error"):
        machine.decode(1, 8)


# Heads ------------------------------------------------------------------------------------------


@functools.cache
def classifier() -> tuple[Any, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_labels": 3}
    config = transformers.LlamaConfig(**sizes, **heads, vocab_size=61, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config).eval().requires_grad_(False)
    return model, build(model, None, backend="eager")


class Heads(RuleBasedStateMachine):
    """Texts, and changes of the head, which is the model's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.compiled = classifier()
        self.weight = self.model.score.weight.clone()

    @rule(lengths=st.sampled_from(((7, 7), (7, 4), (2, 9))), token=TOKENS, labels=st.booleans())
    @torch.no_grad()
    def score(self, lengths: tuple[int, ...], token: int, labels: bool) -> None:
        drawn = torch.Generator().manual_seed(token)
        ids = torch.randint(3, 61, (2, max(lengths)), generator=drawn)
        mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths).unsqueeze(1)
        given: dict[str, Any] = {"input_ids": ids * mask, "attention_mask": mask.long()}
        if labels:
            given["labels"] = torch.tensor([token % 3, 1])
        got, want = self.compiled(**given), self.model(**given)
        assert_close(got.logits, want.logits, 1e-4, "scores")
        if labels:
            assert_close(got.loss, want.loss, 1e-4, "the loss")

    @rule(factor=st.sampled_from((0.5, 2.0)))
    @torch.no_grad()
    def scale(self, factor: float) -> None:
        self.model.score.weight.mul_(factor)

    @torch.no_grad()
    def teardown(self) -> None:
        self.model.score.weight.copy_(self.weight)


def test_any_texts_of_a_classifier() -> None:
    run(Heads)


# Adapters ---------------------------------------------------------------------------------------


@functools.cache
def adapted() -> tuple[Any, Any]:
    model = adapters.adapted()
    return model, build(model, None, backend="eager")


class Adapted(RuleBasedStateMachine):
    """Adapters of the original switched, turned off and merged, between requests and within them.

    A request that began before may go on (what a step computes is then that of its beginning), but
    not once weights are written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model, self.compiled = adapted()
        self.name = cache_name(self.model.get_base_model().forward)
        self.active, self.off, self.merged = "first", False, False
        self.begun: tuple[tuple[str, bool, bool], Any, Any] | None = None

    @property
    def state(self) -> tuple[str, bool, bool]:
        return self.active, self.off, self.merged

    @rule(name=st.sampled_from(("first", "second")))
    def switch(self, name: str) -> None:
        if not self.merged and not self.off:
            self.model.set_adapter(name)
            self.active = name

    @rule()
    def turn(self) -> None:
        if not self.merged:
            layers = self.model.base_model
            (layers.enable_adapter_layers if self.off else layers.disable_adapter_layers)()
            self.off = not self.off

    @rule()
    def merge(self) -> None:
        if not self.off and self.active == "first":
            (self.model.unmerge_adapter if self.merged else self.model.merge_adapter)()
            self.merged = not self.merged

    @rule(token=TOKENS)
    @torch.no_grad()
    def begin(self, token: int) -> None:
        ids = torch.tensor([[5, token, 9, 3]])
        got, want = (model(input_ids=ids) for model in (self.compiled, self.model))
        assert_close(got.logits, want.logits, 1e-4, "a prompt")
        self.begun = self.state, got[self.name], want[self.name]

    @rule(token=TOKENS)
    @torch.no_grad()
    def decode(self, token: int) -> None:
        if self.begun is None:
            return
        state, mine, theirs = self.begun
        new = torch.tensor([[token]])
        try:
            got = self.compiled(input_ids=new, **{self.name: mine}).logits
        except UnsupportedError as error:
            if state == self.state or "changed since this request began" not in str(error):
                raise
            return
        assert state[2] == self.merged, "adapters were added twice"
        if state == self.state:
            want = self.model(input_ids=new, **{self.name: theirs}).logits
            assert_close(got, want, 1e-4, "a decoded token")
        else:
            self.begun = None

    def teardown(self) -> None:
        if self.merged:
            self.model.unmerge_adapter()
        if self.off:
            self.model.base_model.enable_adapter_layers()
        self.model.set_adapter("first")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # of what peft calls
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_any_sequence_of_adapters() -> None:
    pytest.importorskip("peft")
    run(Adapted)
