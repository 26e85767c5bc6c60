"""Models of vision and language: the eager model's logits and tokens, of images and of text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from adaskip_fx import SkipPlan
from adaskip_fx.api import build
from adaskip_fx.capture import reference
from adaskip_fx.kv_cache.argument_names import CACHE_NAMES
from adaskip_fx.model import subclass
from adaskip_fx.model.handle import runtime_of
from tests.support.eager_reference import assert_close, cache_name
from tests.support.images import made, prompt, qwen


class Pair:
    """A model and the same compiled."""

    def __init__(self, kind: str) -> None:
        self.kind, self.model = kind, made(kind)
        self.compiled: Any = build(self.model, None, backend="eager")

    def without(self, *names: str) -> Any:
        """The eager model with sublayers that add nothing."""
        twin = copy.deepcopy(self.model)
        for name in names:
            layer, kind = name.split(".")
            module = twin.model.language_model.layers[int(layer)]
            branch = module.mlp.down_proj if kind == "ffn" else module.self_attn.o_proj
            branch.weight.zero_()
        return twin

    @torch.no_grad()
    def check(self, eager: Any, **given: Any) -> None:
        """Compare a call; AssertionError on a difference."""
        got, want = self.compiled(**given), eager(**given)
        real = given["attention_mask"].bool()[:, -want.logits.shape[1] :]
        assert_close(got.logits[real], want.logits[real], 1e-5, "logits")
        if want.loss is not None:
            assert_close(got.loss, want.loss, 1e-5, "loss")

    def check_generate(self, eager: Any, **given: Any) -> None:
        """Compare what is generated."""
        options = {"max_new_tokens": 6, "do_sample": False, **given}
        got, want = self.compiled.generate(**options), eager.generate(**options)
        assert torch.equal(got, want)


@pytest.fixture(scope="module", params=["llava", "qwen"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


def test_an_image(pair: Pair) -> None:
    given = prompt(pair.kind)
    pair.check(pair.model, **given)
    pair.check(pair.model, **given, labels=given["input_ids"])
    pair.check(pair.model, **given, logits_to_keep=1)


def test_text_alone(pair: Pair) -> None:
    ids = torch.tensor([[5, 9, 3, 22, 41]])
    pair.check(pair.model, input_ids=ids, attention_mask=torch.ones_like(ids))
    pair.check_generate(pair.model, input_ids=ids)


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"num_beams": 2}, marks=pytest.mark.slow)],
    ids=["greedy", "beams"],
)
def test_generate_of_images(pair: Pair, options: dict[str, Any]) -> None:
    pair.check_generate(pair.model, **prompt(pair.kind, rows=1 + (not options)), **options)


def test_under_a_plan(pair: Pair) -> None:
    before, names = pair.compiled.adaskip.plan, ["0.ffn", "1.attention"]
    pair.compiled.adaskip.plan = SkipPlan.of(before.sublayers, names)
    try:
        given = prompt(pair.kind)
        pair.check(pair.without(*names), **given)
        pair.check_generate(pair.without(*names), **given)
        with pytest.raises(AssertionError, match="logits: relative error"):  # the companion
            pair.check(pair.model, **given)
    finally:
        pair.compiled.adaskip.plan = before


@torch.no_grad()
def test_a_loop_by_hand_goes_on_after_an_image(pair: Pair) -> None:
    """Where the positions of what follows are behind those of the image."""
    name, found = cache_name(pair.model.forward), []
    for model in (pair.compiled, pair.model):
        given = {k: v for k, v in prompt(pair.kind).items() if k != "attention_mask"}
        output = model(**given, use_cache=True)
        logits = []
        for token in (11, 12):
            ids = torch.tensor([[token]])
            output = model(input_ids=ids, **{name: output[name]}, use_cache=True)
            logits.append(output.logits)
        found.append(torch.cat(logits, 1))
    assert_close(*found, 1e-5, "logits")


def of_images(output: Any) -> list[torch.Tensor]:
    """All that an output, or a tuple of one, has behind its logits and its cache."""
    if not isinstance(output, tuple):
        output = [v for k, v in output.items() if k not in ("logits", *CACHE_NAMES)]
    return [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"return_dict": False, "logits_to_keep": 2}])
def test_what_became_of_images_is_in_the_output(pair: Pair, options: dict[str, Any]) -> None:
    given = {**prompt(pair.kind, rows=2), "use_cache": False, **options}
    got, want = pair.compiled(**given), pair.model(**given)
    assert type(got) is type(want)
    assert options or list(got) == list(want)
    ours, theirs = of_images(got), of_images(want)
    assert theirs or pair.kind != "llava"  # (Qwen's has them since transformers 5.24)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, 1e-5, "of images")
    if pair.kind == "llava" and not options:
        states = (torch.cat([*o.image_hidden_states]) for o in (got, want))
        assert_close(*states, 1e-5, "of images")


@torch.no_grad()
def test_of_no_image_nothing_is_in_the_output(pair: Pair) -> None:
    ids = torch.tensor([[5, 9, 3, 22, 41]])
    got, want = pair.compiled(input_ids=ids), pair.model(input_ids=ids)
    assert type(got) is type(want)
    behind = {"rope_deltas"}  # zeros, up to transformers 5.19
    assert [*got] == [name for name in want if name not in behind]
    assert of_images(got) == []


class Loop:
    """A text, with or without an image, that is decoded by hand."""

    def __init__(self, model: Any, **given: torch.Tensor) -> None:
        self.model, self.name, self.ids = model, cache_name(model.forward), given["input_ids"]
        given.pop("attention_mask", None)
        self.cache = model(**given, use_cache=True)[self.name]

    def step(self, token: int) -> torch.Tensor:
        """Logits of one more token."""
        new = torch.tensor([[token]])
        self.ids = torch.cat((self.ids, new), 1)
        more = {self.name: self.cache, "use_cache": True}
        logits: torch.Tensor = self.model(input_ids=new, **more).logits
        return logits

    def generate(self) -> list[list[int]]:
        """All tokens, with a few more."""
        ids = torch.cat((self.ids, torch.tensor([[13]])), 1)
        more = {"max_new_tokens": 4, "do_sample": False, self.name: self.cache}
        found: list[list[int]] = self.model.generate(ids, **more).tolist()
        return found


@torch.no_grad()
def test_requests_that_take_turns_keep_their_positions(pair: Pair) -> None:
    """Of models that keep them on themselves as well: each goes on as it does alone."""
    texts = [prompt(pair.kind), {"input_ids": torch.tensor([[5, 9, 3, 22]])}]
    ours = [Loop(pair.compiled, **given) for given in texts]
    alone = [Loop(made(pair.kind), **given) for given in texts]
    for token in (11, 12):
        for mine, theirs in zip(ours, alone, strict=True):
            assert_close(mine.step(token), theirs.step(token), 1e-5, "logits")
    assert [each.generate() for each in ours] == [each.generate() for each in alone]


@torch.no_grad()
@pytest.mark.parametrize("first", ["text", pytest.param("the eager model", marks=pytest.mark.slow)])
def test_the_first_image_that_a_tower_ever_sees(first: str) -> None:
    """It gets hooks then that record, and do nothing else: that is no change of the model."""
    pair, found = Pair("llava"), []
    name, image = cache_name(pair.model.forward), prompt("llava")
    ids = torch.tensor([[5, 9, 3, 22]])
    text = torch.ones(1, ids.shape[1] + image["input_ids"].shape[1], dtype=torch.long)
    image["attention_mask"] = text
    for model in (pair.compiled, pair.model) if first == "text" else (pair.model, pair.compiled):
        held = model(input_ids=ids, use_cache=True)[name]
        found.append(model(**image, **{name: held}, use_cache=True).logits)
    assert_close(*found, 1e-5, "logits")


def test_the_tower_keeps_its_attention(pair: Pair) -> None:
    """It is looked at in both directions; attention as it is lowered is causal."""
    tower = next(
        m for n, m in pair.compiled.named_modules() if n in ("model.vision_tower", "model.visual")
    )
    assert tower.config._attn_implementation == pair.model.config._attn_implementation
    assert pair.compiled.model.language_model.config._attn_implementation == "adaskip"


@pytest.mark.slow
@pytest.mark.breaks
def test_a_tower_with_another_attention_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion."""
    for module in (subclass, reference):
        monkeypatch.setattr(
            module, "set_attention", lambda m, name: m.set_attn_implementation(name)
        )
    pair = Pair("llava")
    with pytest.raises(AssertionError, match="logits: relative error"):
        pair.check(pair.model, **prompt("llava"))


def test_neither_model_is_changed(pair: Pair) -> None:
    before = [dict(vars(m)) for m in pair.model.modules()]
    captures = runtime_of(pair.compiled).counters.captures
    pair.check(pair.compiled, **prompt(pair.kind))
    assert [dict(vars(m)) for m in pair.model.modules()] == before
    assert runtime_of(pair.compiled).counters.captures == captures


def test_images_that_see_themselves_are_refused() -> None:
    pair = Pair("gemma3")
    ids = torch.tensor([[5, 9, 3, 22, 41]])
    text = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    pair.check(pair.model, input_ids=ids, **text)
    pair.check_generate(pair.model, input_ids=ids, **text)
    words = "which see one another; that is not supported"
    with pytest.raises(NotImplementedError, match=words):
        pair.compiled(**prompt("gemma3"))
    with pytest.raises(NotImplementedError, match=words):
        pair.compiled.generate(**prompt("gemma3"), max_new_tokens=3)


def test_texts_that_are_packed_by_an_axis_of_their_own_are_refused() -> None:
    compiled = build(qwen().eval(), None, backend="eager")
    ids = torch.randint(2, 50, (1, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(4, 1, 9).contiguous()
    message = "whose first one begins again within a row"
    with torch.no_grad(), pytest.raises(NotImplementedError, match=message):
        compiled(input_ids=ids, position_ids=positions, use_cache=False)


def test_a_request_whose_positions_are_not_in_it_is_not_saved(pair: Pair, tmp_path: Path) -> None:
    with torch.no_grad():
        cache = pair.compiled(**prompt(pair.kind), use_cache=True)[cache_name(pair.model.forward)]
    if pair.kind == "llava":  # the near miss
        cache.save(tmp_path / "prefix")
        assert pair.compiled.adaskip.load_cache(tmp_path / "prefix").length == cache.length
        return
    with pytest.raises(ValueError, match="keeps the positions that follow an image on itself"):
        cache.save(tmp_path / "prefix")


def test_a_filled_cache_without_its_positions_is_refused(pair: Pair) -> None:
    given = {k: v for k, v in prompt(pair.kind).items() if k != "attention_mask"}
    name, new = cache_name(pair.model.forward), torch.tensor([[11]])
    with torch.no_grad():
        filled = pair.model(**given, use_cache=True)[name]
        if pair.kind == "llava":  # the near miss
            logits = pair.compiled(input_ids=new, **{name: copy.deepcopy(filled)}).logits
            want = pair.model(input_ids=new, **{name: filled}).logits
            assert_close(logits, want, 1e-5, "logits")
            return
        with pytest.raises(ValueError, match="keeps the positions that follow an image on itself"):
            pair.compiled(input_ids=new, **{name: filled})


def test_what_a_tower_reads_is_watched() -> None:
    pair = Pair("llava")
    tower = pair.model.model.vision_tower
    attention = next(m for name, m in tower.named_modules() if name.endswith("self_attn"))
    pair.check(pair.model, **prompt("llava"))
    attention.scale *= 5
    message = r"self_attn\.scale .*was changed after"
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        pair.compiled(**prompt("llava"))
    attention.scale /= 5
    pair.check(pair.model, **prompt("llava"))
