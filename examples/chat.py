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
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    calibration_text = options.learn_from.read_text(encoding="utf-8")
    profile = adaskip_fx.calibrate(model, tokenizer, [calibration_text], max_length=512)
    fast = adaskip_fx.compile(model, profile, options.alpha, backend=options.backend)

    cache = fast.adaskip.new_cache()
    text = torch.empty(1, 0, dtype=torch.int64)
    for turn in options.turn:
        new = tokenizer(turn, return_tensors="pt").input_ids
        prompt = torch.cat([text, new], dim=1)
        with torch.no_grad():
            text = fast.generate(
                prompt, past_key_values=cache, max_new_tokens=options.tokens, do_sample=False
            )
        answer = tokenizer.decode(text[0, prompt.shape[1] :], skip_special_tokens=True)
        print(f"> {turn}\n{answer.strip()}")
    print(fast.adaskip)


if __name__ == "__main__":
    main()
