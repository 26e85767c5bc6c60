"""Save a request's memory to a file: a long prefix is computed once and used by many processes.

The file is one of safetensors: keys, values and states of the filled part, as the request stored
them, and what they belong to as JSON in its metadata. Keys and values are those of one model under
one plan; read by another, they would give text that looks like an answer. So the file names both,
and what does not fit is refused. On several ranks each writes its share (`saved_shares`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from safetensors.torch import save as bytes_of

from adaskip_passes.errors import AdaskipError

from ..parallel.ranks import Ranks
from ..plans.decisions import Decision, PlanChooser, plans_of
from ..plans.skip_plan import SkipPlan
from ..profiles.fingerprint import Fingerprint, fingerprint, is_of
from ..utils.files import JSON, canonical_digest, check_digest, write_atomically
from ..utils.transformers_internals import OFFSETS, keeps_offsets
from . import saved_shares
from .cache import SkipCache
from .retention import Part

if TYPE_CHECKING:
    from ..runtime.runtime import Runtime

SCHEMA = 1
_KEY = "adaskip_cache"
_ABOUT = ("model", "plan", "dtype", "length", "batch", "padded", "sha256")
_REDO = "run the prefix again and save its cache"


class SavedCacheError(AdaskipError, ValueError):
    """A saved cache cannot be read, or does not belong here; the message says why."""


def save(cache: SkipCache, path: Path) -> None:
    """Write a cache's filled part to the file `path`; an old file stays until the new is whole.

    On several ranks all of them call it, and each writes its share to a file of its own.

    Raises:
        SavedCacheError: nothing is stored yet, or the model keeps a part of a request on itself.
        OSError: a file cannot be written; on several ranks all raise it.
    """
    ranks = Ranks.of(cache.owner.model)
    if not cache.length:
        raise SavedCacheError(f"{path}: this cache is empty; save it after a prompt")
    model = cache.owner.model
    if keeps_offsets(model):
        raise SavedCacheError(
            f"{path}: {type(model).__name__} keeps the positions that follow an image on itself "
            f"({OFFSETS}), and not in the cache, so the text could not go on; keep the cache in "
            "this process"
        )
    tensors = {name: t.contiguous().cpu() for name, t in named_tensors(cache).items()}
    about: dict[str, JSON] = {
        "schema": SCHEMA,
        "model": asdict(fingerprint(cache.owner.model)),
        "plan": cache.request.plan.digest,
        "dtype": _name(cache.dtype),
        "length": cache.length,
        "batch": cache.batch,
        "padded": cache.padded,
        "gone": {_named(part, cache): [t.start, t.stop] for part, t in _gone(cache).items()},
        "sha256": _sha256(tensors),
    }
    about |= saved_shares.facts(str(about["sha256"]), ranks)
    about["digest"] = canonical_digest(about)
    data, file = bytes_of(tensors, {_KEY: json.dumps(about)}), saved_shares.file_of(path, ranks)
    ranks.apart("saving a cache", lambda: write_atomically(file, data))


def load_cache(runtime: Runtime, given: str | Path, plan: Decision | None = None) -> SkipCache:
    """Return a cache with what `save` wrote to a path, at the beginning of a turn.

    Args:
        runtime: of a compiled model of the same model.
        given: the path that it was saved to.
        plan: what the request goes on with; the runtime's decision if None. Its plan for prompts
            must be the one that the file was made with, or a choice among plans that has it.

    Raises:
        SavedCacheError: the file is not one of these, is truncated, or belongs to another model or
            plan, or to as many other ranks; the message says what is wrong and what to do.
        RanksError: the files of ranks are not of one cache.
    """
    ranks = runtime.ranks
    path = saved_shares.file_of(Path(given), ranks)
    about, tensors = ranks.apart("a saved cache", partial(_read, Path(given), path, ranks))
    ranks.agree("a saved cache", (about.get("shares"), about["length"], about["plan"]))
    _check_model(path, about, runtime)
    cache = runtime.new_cache(about["length"], plan=plan)
    _check_plan(path, about["plan"], cache, runtime)
    buffers = cache.reserve(about["batch"], about["length"])
    cache.advance(about["length"])
    cache.padded = about["padded"]
    buffers.sliding.forget(_forgotten(path, about, cache))
    wanted = named_tensors(cache)
    forms = [{name: _form(t) for name, t in group.items()} for group in (tensors, wanted)]
    if forms[0] != forms[1]:
        names = sorted({*tensors, *wanted})
        name = next(n for n in names if forms[0].get(n) != forms[1].get(n))
        has, stores = (form.get(name, "nothing") for form in forms)
        raise SavedCacheError(
            f"{path}: has {has} as {name}, where this model and plan store {stores}; {_REDO}"
        )
    for name, tensor in wanted.items():
        tensor.copy_(tensors[name])
    return cache


def named_tensors(cache: SkipCache) -> dict[str, torch.Tensor]:
    """Return all that a cache stores, by names such as ``3.keys``: views of its buffers.

    Where tokens in the middle are gone, those after them are ``3.keys.last``; where heads hold
    other tokens than those beside them, those of head 2 are ``3.2.keys``.
    """
    buffers = cache.lease.buffers
    assert buffers is not None
    found: dict[str, torch.Tensor] = {}
    for i, pair in enumerate(zip(cache.keys, cache.values, strict=True)):
        pieces = buffers.sliding.pieces(i, cache.kept[i].key_heads, cache.length)
        for name, stored in zip(("keys", "values"), pair, strict=True):
            if stored is None:
                continue
            for part, held in pieces:
                which = f"{_named(part, cache)}.{name}"
                found[f"{which}.last" if held.start else which] = part.cut(stored, held)
        for state, tensor in zip(cache.kept[i].states, buffers.states[i], strict=True):
            found[f"{i}.{state.kind}.{state.index}"] = tensor
    return found


def _named(part: Part, cache: SkipCache) -> str:
    """Return the name of a part in a file: its layer, and its head if it is not all of them."""
    whole = part.heads == cache.specs[part.layer].key_heads
    return str(part.layer) if whole else f"{part.layer}.{part.first}"


def _part(name: str, cache: SkipCache) -> Part:
    """Return the part that `_named` gave a name."""
    layer, *head = map(int, name.split("."))
    return Part(layer, head[0], 1) if head else Part(layer, 0, cache.specs[layer].key_heads)


def _forgotten(path: Path, about: Mapping[str, Any], cache: SkipCache) -> dict[Part, range]:
    """Return what the file's request had let go; what this one may still read is refused."""
    found = dict[Part, range]()
    for name, (start, stop) in about.get("gone", {}).items():
        part = _part(name, cache)
        found[part], held = range(start, stop), part.of(cache.retention)
        if held is None or start < held.first or stop > about["length"] - held.last:
            raise SavedCacheError(
                f"{path}: tokens {start} to {stop - 1} of layer {part.layer} were let go, which a "
                f"plan of this request may read; load it with the plan of the file, or {_REDO}"
            )
    return found


def _gone(cache: SkipCache) -> dict[Part, range]:
    return cache.lease.buffers.sliding.gone if cache.lease.buffers is not None else {}


def _read(given: Path, path: Path, ranks: Ranks) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return what a rank's file says of itself, checked, and its tensors."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            about = _checked(path, metadata.get(_KEY))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as cause:
        why = saved_shares.why_missing(given, ranks)
        said = "no such file; check the path, or" if why is None else f"{why};"
        raise SavedCacheError(f"{path}: {said} {_REDO}") from cause
    except OSError as cause:
        raise SavedCacheError(f"{path}: cannot be read ({cause}); check the path") from cause
    except safetensors.SafetensorError as cause:
        raise SavedCacheError(
            f"{path}: truncated, or not a saved cache ({cause}); {_REDO}"
        ) from cause
    check_digest(path, about["sha256"], _sha256(tensors), SavedCacheError, _REDO)
    elsewhere = saved_shares.why_not_here(about, ranks)
    if elsewhere is not None:
        raise SavedCacheError(f"{path}: {elsewhere}; {_REDO}")
    return about, tensors


def _checked(path: Path, text: str | None) -> dict[str, Any]:
    try:
        about = json.loads(text or "null")
    except ValueError:
        about = None
    if not isinstance(about, dict) or type(about.get("schema")) is not int:
        raise SavedCacheError(f"{path}: not a saved cache of adaskip_fx; check the path")
    if about["schema"] > SCHEMA:
        raise SavedCacheError(
            f"{path}: schema {about['schema']} is newer than this version reads ({SCHEMA}); "
            f"upgrade adaskip-fx, or {_REDO}"
        )
    missing = [key for key in (*_ABOUT, "digest") if key not in about]
    if missing:
        raise SavedCacheError(f"{path}: missing {', '.join(missing)}; {_REDO}")
    content = canonical_digest({key: value for key, value in about.items() if key != "digest"})
    check_digest(path, about["digest"], content, SavedCacheError, _REDO)
    return about


def _check_model(path: Path, about: dict[str, Any], runtime: Runtime) -> None:
    saved, here = Fingerprint(**about["model"]), fingerprint(runtime.model)
    dtype = _name(runtime.model.dtype)
    if not is_of(saved, runtime.model):
        what = f"of another model: {saved}, this one is {here}"
    elif about["dtype"] != dtype:
        what = f"of a model in {about['dtype']}, this one is in {dtype}"
    elif saved.weights != here.weights:
        what = f"of the same architecture ({here.model_type}) with other weights or adapters"
    else:
        return
    raise SavedCacheError(f"{path}: {what}; {_REDO}")


def _check_plan(path: Path, digest: str, cache: SkipCache, runtime: Runtime) -> None:
    """Refuse another plan; a request that may choose one of several has the file's."""
    request = cache.request
    plans: tuple[SkipPlan, ...] = (request.plan,)
    if isinstance(request.decision, PlanChooser):
        plans = plans_of(request.decision)
    chosen = next((plan for plan in plans if plan.digest == digest), None)
    if chosen is None:
        here = " or ".join(plan.digest for plan in plans)
        raise SavedCacheError(
            f"{path}: made under plan {digest}, but a request here begins with {here}; load it "
            f"with plan=, or {_REDO}"
        )
    if request.undecided:
        cache.request = request.new_request(chosen)
        retention = runtime.graphs.retention(cache.request.plans)
        cache.keep(runtime.graphs.stored(chosen), retention)


def _sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {_form(tensors[name])}".encode())
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _form(tensor: torch.Tensor) -> str:
    return f"{_name(tensor.dtype)} {list(tensor.shape)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
