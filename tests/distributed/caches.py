"""Checks of `worker` in which ranks save their shares of a cache to files, and load them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.distributed.drafts import models
from tests.distributed.failures import told


def _tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(1, 98, (2, count), generator=torch.Generator().manual_seed(seed))


def _saved(model: Any, ids: torch.Tensor, path: Path) -> None:
    cache = model.adaskip.new_cache()
    model(ids, past_key_values=cache, logits_to_keep=1)
    cache.save(path)


def saved(shared: Any) -> Any:
    """A prefix that is read once and gone on with twice; files that are not of these ranks."""
    fast, folder, ids = shared.fast, shared.folder / "saved", _tokens(12, 8)
    folder.mkdir(exist_ok=True)
    path = folder / "prefix.safetensors"
    _saved(fast, ids[:, :9], path)
    dist.barrier()
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6}
    cache = fast.adaskip.load_cache(path)
    made = fast.generate(ids, past_key_values=cache, **options)
    files = sorted(file.name for file in folder.iterdir())
    mine = folder / f"prefix.{shared.rank}-of-2.safetensors"
    dist.barrier()
    return {
        "files": files,
        "keys": {name: keys.flatten()[:4].tolist() for name, keys in load_file(mine).items()},
        "tokens": made.tolist(),
        "greedy": shared.llamas[0].generate(ids, **options).tolist(),
        "refused": _refused(shared, folder, path),
    }


def _refused(shared: Any, folder: Path, path: Path) -> dict[str, str]:
    """What is said where the files are others."""
    fast, of_one = shared.fast, models(shared).of_one
    found, other, one = {}, folder / "other.safetensors", folder / "one.safetensors"
    _saved(fast, _tokens(9, 9), other)
    if shared.rank == 0:
        _saved(of_one, _tokens(9, 9), one)
        for rank in range(4):
            (folder / f"four.{rank}-of-4.safetensors").touch()
        first, second = (folder / f"prefix.{rank}-of-2.safetensors" for rank in range(2))
        for name, shares in (
            ("mixed", (first, folder / "other.1-of-2.safetensors")),
            ("exchanged", (second, second)),
            ("cut", (first, second)),
        ):
            for rank, share in enumerate(shares):
                shutil.copy(share, folder / f"{name}.{rank}-of-2.safetensors")
        cut = folder / "cut.1-of-2.safetensors"
        cut.write_bytes(cut.read_bytes()[:-9])
    dist.barrier()
    for name, model, file in (
        ("of two in one process", of_one, "prefix"),
        ("a share in one process", of_one, "prefix.1-of-2"),
        ("of one on two", fast, "one"),
        ("of four on two", fast, "four"),
        ("the other's share", fast, "exchanged"),
        ("one is cut", fast, "cut"),
        ("of two caches", fast, "mixed"),
        ("nothing", fast, "nothing"),
    ):
        where = folder / f"{file}.safetensors"
        found[name] = told(lambda m=model, w=where: m.adaskip.load_cache(w))["text"]
    return found


CHECKS: dict[str, Callable[[Any], Any]] = {"saved": saved}
