"""A tokenizer of transformers' with one token a character, and a few of two, made in memory."""

from __future__ import annotations

import string
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.compiled_llamas import VOCABULARY

PAD, END = "_", "$"
_LONGER = ("aa", "ab", "bb")  # which no text begins with, and a model may say
_LETTERS = string.ascii_lowercase + string.digits + string.ascii_uppercase
_WORDS = (*_LETTERS[: VOCABULARY - 2 - len(_LONGER)], *_LONGER)
_CHAT = (
    "{% for message in messages %}{{ message['role'][0] + message['content'] + '9' }}{% endfor %}"
)


def character_tokenizer() -> Any:
    """Its ids are those of the tiny models' vocabulary; it pads on the left and has a chat form."""
    ids = {letter: i for i, letter in enumerate((PAD, END, *_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        bos_token=END,
        unk_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = _CHAT
    return made
