"""The command line, run in this process on a tiny model that is saved."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import adaskip_fx
from adaskip_fx.cli.app import app

LAYERS, KV_HEADS, HEAD_DIM = 2, 1, 8


SUBLAYERS = tuple(
    adaskip_fx.Sublayer(layer, kind) for layer in range(LAYERS) for kind in ("attention", "ffn")
)


def run(*arguments: object, text: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=text)


def refused(result: Result, code: int = 1) -> str:
    """The one error line of a command that ended with `code`."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code
    assert "Traceback" not in result.output
    *progress, last = result.stderr.strip().splitlines()
    assert not any(line.startswith("error:") for line in progress)
    assert last.startswith("error: ")
    return last


def make_tokenizer(template: str | None = None) -> Any:
    """One token a character."""
    known = ["<unk>", "<s>", "</s>", *sorted(string.printable)]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = template
    return fast


def make_model(layers: int = LAYERS) -> Any:
    torch.manual_seed(layers)
    config = LlamaConfig(
        vocab_size=3 + len(string.printable),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.3,  # by default sublayers would hardly matter
    )
    return LlamaForCausalLM(config).eval()


def save(folder: Path, layers: int = LAYERS, template: str | None = None) -> Path:
    make_model(layers).save_pretrained(folder)
    make_tokenizer(template).save_pretrained(folder)
    return folder


def misused(result: Result) -> str:
    """The message of a command line that is wrong: exit code 2, and nothing on stdout."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    usage, *_, last = result.stderr.strip().splitlines()
    assert usage.startswith("Usage: ")
    assert last.startswith("Error: ")
    return last
