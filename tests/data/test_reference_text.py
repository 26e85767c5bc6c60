"""The Python reference in two halves, and the texts that are drawn from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from adaskip_fx.data import reference_text
from tests.support.command_line import make_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def drawn(tokenizer: Any, seed: int = 0) -> reference_text.Texts:
    return reference_text.demo_texts(
        tokenizer,
        calibration=(4, 100),
        prompts=3,
        prompt_tokens=3000,
        held_out=(2, 200),
        seed=seed,
    )


def test_nothing_is_asked_about_that_was_calibrated_on() -> None:
    calibration, held_out = reference_text.halves()
    assert not set(calibration) & set(held_out)
    assert sum(map(len, held_out)) > 100_000
    given = drawn(make_tokenizer())
    tokenizer = make_tokenizer()
    seen = "\n\n".join(calibration)
    assert all(sample in seen for sample in given.calibration)
    for window in given.held_out:
        assert len(window) == 200
        assert tokenizer.decode(list(window)) not in seen


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_pass_key_is_hidden_where_it_is_said_to_be(template: str | None) -> None:
    tokenizer = make_tokenizer(template)
    given = drawn(tokenizer)
    assert [p.depth for p in given.passkeys] == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    for passkey in given.passkeys:
        text = tokenizer.decode(list(passkey.ids))
        assert len(passkey.ids) >= 3000
        assert text.count(passkey.key) == 2  # both in the one sentence
        assert text.index(passkey.key) / len(text) == pytest.approx(passkey.depth, abs=0.2)
        assert text.endswith("The secret number is")
        assert ("<assistant>" in text) == (template is not None)
    assert len({p.key for p in given.passkeys}) == 3


def test_texts_follow_the_seed() -> None:
    tokenizer = make_tokenizer()
    assert drawn(tokenizer) == drawn(tokenizer)
    assert drawn(tokenizer).passkeys != drawn(tokenizer, seed=1).passkeys


def test_samples_are_cut_and_spread() -> None:
    cut: Callable[..., list[str]] = reference_text.calibration_samples
    assert cut(["ab" * 30], 10, None) == ["ab" * 30]
    assert cut(["a" * 60 + "b" * 60 + "c" * 59], 10, None) == ["a" * 60, "b" * 60]
    assert cut(["short", "a" * 60], 10, None) == ["short", "a" * 60]
    many = [str(i) * 6 for i in range(9)]
    assert cut(many, 1, 3) == [many[0], many[3], many[6]]
    assert cut(many, 1, 20) == many
