"""A chat on one cache: each turn reads only what is new.

python examples/chat.py MODEL --learn-from FILE --turn "Hello." --turn "And what else?"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import adaskip_fx


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--learn-from", type=Path, required=True, help="a text to calibrate on")
    parser.add_argument("--turn", action="append", required=True)
    parser.add_argument("--alpha", type=float, default=1.2)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--backend", default="inductor")
    given = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model).eval()
    learned = given.learn_from.read_text(encoding="utf-8")
    profile = adaskip_fx.calibrate(model, tokenizer, [learned], max_length=512)
    fast = adaskip_fx.compile(model, profile, given.alpha, backend=given.backend)

    cache = fast.adaskip.new_cache()
    text = torch.empty(1, 0, dtype=torch.int64)
    for turn in given.turn:
        new = tokenizer(turn, return_tensors="pt").input_ids
        said = torch.cat([text, new], dim=1)
        with torch.no_grad():
            text = fast.generate(
                said, past_key_values=cache, max_new_tokens=given.tokens, do_sample=False
            )
        answer = tokenizer.decode(text[0, said.shape[1] :], skip_special_tokens=True)
        print(f"> {turn}\n{answer.strip()}")
    print(fast.adaskip)


if __name__ == "__main__":
    main()
