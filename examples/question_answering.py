"""Answer a question about a long document, with sublayers skipped and without.

python examples/question_answering.py MODEL DOCUMENT "What is it about?"
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import adaskip_fx


def answer(model, tokenizer, document: str, question: str, tokens: int) -> tuple[str, float]:
    """Return the answer, and how many seconds it took."""
    ids = tokenizer(f"{document}\n\nQuestion: {question}\nAnswer:", return_tensors="pt").input_ids
    ids = ids.to(model.device)
    begin = time.perf_counter()
    with torch.no_grad():
        output = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    seconds = time.perf_counter() - begin
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True), seconds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("document", type=Path)
    parser.add_argument("question")
    parser.add_argument("--alpha", type=float, default=1.2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--backend", default="inductor")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    document = options.document.read_text(encoding="utf-8")
    half = len(document) // 2  # one half to learn from, all of it to answer about
    profile = adaskip_fx.calibrate(model, tokenizer, [document[:half]], max_length=512)
    fast = adaskip_fx.compile(model, profile, options.alpha, backend=options.backend)
    fast.adaskip.warmup(len(tokenizer(document).input_ids) + options.tokens + 64)

    for name, compared in (("as it is", model), ("skipped", fast)):
        text, seconds = answer(compared, tokenizer, document, options.question, options.tokens)
        print(f"{name} ({seconds:.1f} s): {text.strip()}")
    print(fast.adaskip)


if __name__ == "__main__":
    main()
