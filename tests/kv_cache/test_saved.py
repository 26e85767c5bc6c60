"""Caches in files: what comes back is what was saved, and what does not fit is refused in words."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from adaskip_fx.contrib.routing import Choice, Option
from adaskip_fx.kv_cache import saved
from adaskip_fx.kv_cache.cache import SkipCache
from adaskip_fx.kv_cache.saved import SavedCacheError, load_cache, named_tensors
from adaskip_fx.plans.decisions import Schedule
from adaskip_fx.plans.skip_plan import SkipPlan
from tests.support.compiled_llamas import Entry, entry
from tests.support.eager_reference import assert_close

SHAPE = "grouped"


@pytest.fixture
def bank() -> Iterator[Entry]:
    one = entry(SHAPE)
    with one.using():
        yield one


def prefix(bank: Entry, rows: int = 2, plan: Any = None, mask: Any = None) -> SkipCache:
    cache = bank.runtime.new_cache(plan=plan)
    with torch.no_grad():
        bank.compiled(
            bank.tokens(rows, 6), past_key_values=cache, logits_to_keep=1, attention_mask=mask
        )
    return cache


def continued(bank: Entry, cache: SkipCache) -> torch.Tensor:
    """Logits after three more tokens, by a prompt of two and a step."""
    with torch.no_grad():
        for ids in (bank.tokens(cache.batch, 2, 1), bank.tokens(cache.batch, 1, 2)):
            output = bank.compiled(ids, past_key_values=cache, logits_to_keep=1)
    logits: torch.Tensor = output.logits
    return logits


@pytest.mark.parametrize("skip", [[], ["0.attention"], ["0.attention", "1.attention"]])
def test_what_is_loaded_goes_on_as_what_was_saved(
    bank: Entry, tmp_path: Path, skip: list[str]
) -> None:
    plan = bank.plan(skip)
    cache, path = prefix(bank, plan=plan), tmp_path / "prefix.safetensors"
    cache.save(path)
    loaded = load_cache(bank.runtime, path, plan)
    assert loaded in bank.runtime.live_caches()
    assert (loaded.length, loaded.batch, loaded.padded) == (6, 2, False)
    assert loaded.stored == cache.stored
    before = named_tensors(cache)
    for name, tensor in named_tensors(loaded).items():
        assert torch.equal(tensor, before[name])
        assert tensor.data_ptr() != before[name].data_ptr()
    assert torch.equal(continued(bank, loaded), continued(bank, cache))


def test_a_loaded_prefix_is_that_of_the_eager_model(bank: Entry, tmp_path: Path) -> None:
    path = tmp_path / "prefix"
    prefix(bank).save(path)
    reference = bank.reference_cache()
    for ids in (bank.tokens(2, 6), bank.tokens(2, 2, 1), bank.tokens(2, 1, 2)):
        logits = bank.oracle.step(ids, reference)[:, -1:]
    assert_close(continued(bank, load_cache(bank.runtime, str(path))), logits, 1e-5)


def test_values_that_are_not_copied_show(
    bank: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The companion: the reader is handed other values than those of the file."""
    read = saved._read

    def halved(*where: Any) -> Any:
        about, tensors = read(*where)
        return about, {name: tensor / 2 for name, tensor in tensors.items()}

    monkeypatch.setattr(saved, "_read", halved)
    with pytest.raises(AssertionError, match="relative error"):
        test_a_loaded_prefix_is_that_of_the_eager_model(bank, tmp_path)


def test_padding_is_remembered(bank: Entry, tmp_path: Path) -> None:
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    prefix(bank, mask=mask).save(tmp_path / "padded")
    assert load_cache(bank.runtime, tmp_path / "padded").padded


def test_a_choice_takes_the_plan_that_the_file_was_made_with(bank: Entry, tmp_path: Path) -> None:
    plans = [bank.plan(), bank.plan(["1.attention"])]
    axes = [tuple(float(i == k) for i in range(32)) for k in range(2)]
    pairs = zip("ab", plans, axes, strict=True)
    choice = Choice(tuple(Option(name, plan, axis) for name, plan, axis in pairs))
    prefix(bank, plan=plans[1]).save(tmp_path / "chosen")
    loaded = load_cache(bank.runtime, tmp_path / "chosen", choice)
    assert loaded.request.plan == plans[1]
    assert not loaded.request.undecided
    assert loaded.stored == (True, False)
    expected = continued(bank, prefix(bank, plan=plans[1]))
    assert torch.equal(continued(bank, loaded), expected)


def test_a_schedule_begins_anew(bank: Entry, tmp_path: Path) -> None:
    schedule = Schedule(((0, bank.plan()), (2, bank.plan([], ["0.ffn"]))))
    prefix(bank, plan=schedule).save(tmp_path / "first")
    loaded = load_cache(bank.runtime, tmp_path / "first", schedule)
    assert loaded.request.decision == schedule


def test_an_old_file_stays_until_the_new_is_whole(
    bank: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prefix"
    prefix(bank).save(path)
    before = path.read_bytes()

    def broken(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("adaskip_fx.utils.files.os.fsync", broken)
    with pytest.raises(OSError, match="no space left"):
        prefix(bank, 1).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["prefix"]


# Refusals ---------------------------------------------------------------------------------------


def rewritten(
    path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]
) -> None:
    """Write the file anew with another description or other tensors."""
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[saved._KEY])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(about, tensors)
    safetensors.torch.save_file(tensors, path, {saved._KEY: json.dumps(about)})


def signed(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Have the file's own digests be right, as another program's would be."""
    about["sha256"] = saved._sha256(tensors)
    rest = {key: value for key, value in about.items() if key != "digest"}
    about["digest"] = saved.canonical_digest(rest)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def newer(path: Path) -> None:
    rewritten(path, lambda about, tensors: about.update(schema=99))


def edited(path: Path) -> None:
    rewritten(path, lambda about, tensors: about.update(length=5))


def without_plan(path: Path) -> None:
    rewritten(path, lambda about, tensors: about.pop("plan"))


def without_values(path: Path) -> None:
    def change(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del tensors["1.values"]
        signed(about, tensors)

    rewritten(path, change)


def of_other_shape(path: Path) -> None:
    def change(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["0.keys"] = tensors["0.keys"][:, :1].contiguous()
        signed(about, tensors)

    rewritten(path, change)


def another_kind(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "none": (Path.unlink, "no such file; check the path, or run the prefix again and save its ca"),
    "truncated": (truncated, r"truncated, or not a saved cache \("),
    "text": (lambda p: p.write_text("hello, this is no cache"), r"truncated, or not a saved cache"),
    "a flipped bit": (flipped, r"edited after it was saved \(digest [0-9a-f]{64} is"),
    "of a newer version": (newer, r"schema 99 is newer than this version reads \(1\); upgrade ada"),
    "edited": (edited, "edited after it was saved"),
    "incomplete": (without_plan, "missing plan; run the prefix again"),
    "without a tensor": (
        without_values,
        r"has nothing as 1\.values, where this model and plan store float32 \[2, 2, 6, 8\]",
    ),
    "of another shape": (of_other_shape, r"has float32 \[2, 1, 6, 8\] as 0\.keys, where"),
    "of another kind": (another_kind, "not a saved cache of adaskip_fx; check the path"),
}


@pytest.mark.parametrize("case", sorted(FILES))
def test_files_that_are_refused(bank: Entry, tmp_path: Path, case: str) -> None:
    spoil, words = FILES[case]
    path = tmp_path / "prefix"
    prefix(bank).save(path)
    spoil(path)
    live = set(map(id, bank.runtime.live_caches()))
    with pytest.raises(SavedCacheError, match=f"^{path}: {words}"):
        load_cache(bank.runtime, path)
    assert {id(cache) for cache in bank.runtime.live_caches()} <= live


def test_a_folder(bank: Entry, tmp_path: Path) -> None:
    with pytest.raises(SavedCacheError, match=f"^{tmp_path}: "):
        load_cache(bank.runtime, tmp_path)


def test_another_plan(bank: Entry, tmp_path: Path) -> None:
    path, plan = tmp_path / "prefix", bank.plan(["1.ffn"])
    prefix(bank, plan=plan).save(path)
    here = SkipPlan.empty(bank.sublayers).digest
    words = f"made under plan {plan.digest}, but a request here begins with {here}; load it with"
    with pytest.raises(SavedCacheError, match=words):
        load_cache(bank.runtime, path)


def test_another_model(bank: Entry, tmp_path: Path) -> None:
    path, other = tmp_path / "prefix", entry("equal_heads")
    prefix(bank).save(path)
    with pytest.raises(SavedCacheError, match=r"of another model: .* \(llama, .*, this one is"):
        load_cache(other.runtime, path)


def test_other_weights(bank: Entry, tmp_path: Path) -> None:
    path = tmp_path / "prefix"
    prefix(bank).save(path)
    weight = bank.model.model.norm.weight
    before = copy.deepcopy(weight.data)
    weight.data.add_(1.0)
    try:
        words = r"of the same architecture \(llama\) with other weights or adapters; run the prefix"
        with pytest.raises(SavedCacheError, match=words):
            load_cache(bank.runtime, path)
    finally:
        weight.data.copy_(before)
    assert load_cache(bank.runtime, path).length == 6


def test_another_dtype(bank: Entry, tmp_path: Path) -> None:
    path = tmp_path / "prefix"
    prefix(bank).save(path)
    rewritten(path, lambda about, tensors: (about.update(dtype="bfloat16"), signed(about, tensors)))
    with pytest.raises(SavedCacheError, match="of a model in bfloat16, this one is in float32"):
        load_cache(bank.runtime, path)


def test_an_empty_cache(bank: Entry, tmp_path: Path) -> None:
    with pytest.raises(SavedCacheError, match="this cache is empty; save it after a prompt"):
        bank.runtime.new_cache().save(tmp_path / "empty")
    assert not list(tmp_path.iterdir())
