"""Calibration: run the instrumented full model over texts and keep what it measured."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers

from adaskip_fx.model.handle import runtime_of
from adaskip_fx.runtime.runtime import Runtime
from adaskip_fx.runtime.similarity import measure_prompt, measure_windows

from ..api import build
from ..model.check_model import check_model
from ..parallel.ranks import Ranks
from ..parallel.replicas import DataParallel, Replicas, replicas_of
from ..plans.sublayer import Sublayer
from ..plans.windows import Window
from ..profiles.fingerprint import fingerprint
from ..profiles.head_windows import HeadWindows, check_windows
from ..profiles.profile import PROBE_STATS, Array, Profile
from .tokenizer import Tokenizer

_MIN_TOKENS = 16  # of a sample: fewer say nothing about long contexts


def calibrate(
    model: Any,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    max_length: int = 2048,
    *,
    backend: str = "eager",
    progress: Callable[[int, int], None] | None = None,
    windows: Sequence[Window] = (),
    data_parallel: DataParallel = False,
) -> Profile:
    """Measure how much each sublayer changes the residual stream (AdaSkip, eq. 1 to 3).

    Each text is one sample; of a longer one the first `max_length` tokens are used. Probes run in
    float32 on the device, over all tokens. A token whose stream at a sublayer is zero or not finite
    does not count for it; the profile says how many did not.

    Args:
        model: a transformers decoder in evaluation mode, or a ``PeftModel`` around one, which is
            measured with the adapters that are on; it is not changed. A prompt that peft has
            learned is left out.
        tokenizer: the model's; called on each text.
        texts: what the model will be used on, or close to it.
        max_length: tokens of a sample at most.
        backend: inner torch.compile backend; ``"eager"`` needs no compilation.
        progress: called with (samples done, samples in all), on the first process alone.
        windows: measure besides, in the same runs, how much the stream after a layer changes if one
            of its K/V heads sees such a window, for `WindowedBySimilarity`; where one can.
        data_parallel: share the texts among the processes of ``torch.distributed``, or of a group,
            each of which has the model and makes this call.

    Returns:
        The profile of the model, on each process.

    Raises:
        ValueError: no text, a text of fewer than 16 tokens, such a `max_length`, or a text of
            which less than half counts for some sublayer; windows that say nothing, or none can be.
        UnsupportedError, PlanError: the model's sublayers cannot be captured or proven; its
            attention cannot be measured through windows.
        RanksError: processes have other models or texts, or one is gone.
    """
    replicas = replicas_of(model, data_parallel)
    read = partial(_read, model, tokenizer, texts, max_length, windows)
    decoder, samples = replicas.ranks.apart("preparing to calibrate", read)
    known, tokens = fingerprint(decoder), token_digest(samples)
    replicas.check_model(known.weights, known.digest, decoder.dtype)
    replicas.ranks.agree("the texts to calibrate on", (tokens, max_length, tuple(windows)))
    compiled = partial(_compiled, decoder, tokens, backend)
    runtime = replicas.ranks.apart("compiling to calibrate", compiled)
    statistics, layers, through = _run(replicas, runtime, samples, windows, progress)
    return Profile(
        sublayers=runtime.sublayers,
        statistics=statistics,
        layers=layers,
        left_out=left_out_counts(runtime.sublayers, statistics, _lengths(samples)),
        fingerprint=known,
        versions={"torch": str(torch.__version__), "transformers": transformers.__version__},
        calibration=_about(decoder, tokenizer, len(samples), max_length, tokens),
        windows=through,
    )


def _read(
    model: Any,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    max_length: int,
    windows: Sequence[Window],
) -> tuple[Any, list[torch.Tensor]]:
    """Return the decoder and the samples [1, T], after what can be refused at once."""
    decoder = check_model(model)
    if windows:
        Ranks.of(decoder).refuse(
            "calibrating windows by K/V head", "each has heads of its own: calibrate on one"
        )
    samples = tokenize(decoder, tokenizer, texts, max_length)
    check_windows(windows, max(_lengths(samples)))
    return decoder, samples


def _compiled(decoder: Any, tokens: str, backend: str) -> Runtime:
    """Return what runs a decoder whose ranks all have the samples of one digest."""
    runtime = runtime_of(build(decoder, None, backend=backend))
    runtime.ranks.agree("the texts to calibrate on", tokens)
    return runtime


def _about(
    decoder: Any, tokenizer: Tokenizer, samples: int, max_length: int, tokens: str
) -> dict[str, Any]:
    """Return what a profile says of its texts."""
    return {
        "samples": samples,
        "max_length": max_length,
        "tokenizer": str(getattr(tokenizer, "name_or_path", type(tokenizer).__name__)),
        "tokens_sha256": tokens,
        "dtype": str(decoder.dtype).removeprefix("torch."),
    }


def _lengths(samples: Iterable[torch.Tensor]) -> list[int]:
    return [ids.shape[1] for ids in samples]


def _run(
    replicas: Replicas,
    runtime: Runtime,
    samples: Sequence[torch.Tensor],
    windows: Sequence[Window],
    progress: Callable[[int, int], None] | None,
) -> tuple[Array, Array, HeadWindows | None]:
    """Return the statistics [samples, sublayers or layers, 5], and those of windows, if any."""
    if progress is not None and replicas.ranks.rank == 0:
        progress(0, len(samples))
    readings = replicas.share(
        "calibrating on a text",
        _lengths(samples),
        lambda index: _measured(runtime, samples[index].to(runtime.device), windows),
        progress,
    )
    of_texts, of_layers = np.split(
        np.stack([reading for reading, _ in readings]), [len(runtime.sublayers)], axis=1
    )
    changes = [c for _, c in readings if c is not None]
    if not changes:
        return of_texts, of_layers, None
    kv_heads = runtime.graphs.structure.kv_heads
    return of_texts, of_layers, HeadWindows(tuple(windows), kv_heads, np.stack(changes))


def _measured(
    runtime: Runtime, ids: torch.Tensor, windows: Sequence[Window]
) -> tuple[Array, Array | None]:
    """Return the statistics of a sample [1, T], and those of windows, if there are any."""
    if not windows:
        return _of_one_row(measure_prompt(runtime, ids, layers=True)), None
    if not runtime.graphs.structure.kv_heads:
        raise ValueError("no attention of this model can have a window: calibrate without windows")
    reading, changes = measure_windows(runtime, ids, windows)
    return _of_one_row(reading), _of_one_row(changes)


def _of_one_row(reading: torch.Tensor) -> Array:
    """Return a reading [..., 1, statistics] without the rows, in float64."""
    return np.asarray(reading[..., 0, :].double().cpu().numpy())


def tokenize(
    model: Any, tokenizer: Tokenizer, texts: Iterable[str], max_length: int
) -> list[torch.Tensor]:
    """Return one int64 tensor [1, tokens] per text, without what the tokenizer's mask leaves out.

    A masked token is seen by no other one and takes no position, so a text without it is the same
    text.

    Args:
        model: its configuration says how many positions there are.
        tokenizer: called on each text.
        texts: at least one.
        max_length: tokens of a text at most; further ones are cut off.

    Raises:
        ValueError: no text, a text of fewer than 16 tokens, or a `max_length` below 16 or above the
            model's positions.
        TypeError: one string instead of several texts.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of texts, not one string")
    if not isinstance(max_length, int) or max_length < _MIN_TOKENS:
        raise ValueError(f"max_length {max_length!r} is less than {_MIN_TOKENS} tokens")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and max_length > longest:
        raise ValueError(f"max_length {max_length} is more than the model's {longest} positions")
    samples = []
    for index, text in enumerate(texts):
        encoded = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        sample = unmasked(encoded)
        if sample.shape[1] < _MIN_TOKENS:
            raise ValueError(
                f"calibration text {index} has {sample.shape[1]} tokens; at least {_MIN_TOKENS} "
                "are needed. Use longer texts, like those the model will see"
            )
        samples.append(sample)
    if not samples:
        raise ValueError("no calibration text was given; pass at least one text")
    return samples


def unmasked(encoded: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the ids [1, tokens] of one encoded text, without those that its mask leaves out."""
    ids: torch.Tensor = encoded["input_ids"]
    if "attention_mask" in encoded:
        ids = ids[encoded["attention_mask"].bool()][None]
    return ids


def left_out_counts(
    sublayers: Sequence[Sublayer], statistics: Array, tokens: Sequence[int]
) -> Array:
    """Return how many of each sample's tokens the statistics leave out, [samples, sublayers].

    Args:
        sublayers: what was measured.
        statistics: [samples, sublayers, 5], sums of `PROBE_STATS`.
        tokens: how many each sample has.

    Raises:
        ValueError: more than half of a sample is left out at a sublayer, so that the rest does not
            represent it. The message names the first such sublayer.
    """
    missing = np.asarray(tokens)[:, None] - statistics[:, :, PROBE_STATS.index("tokens")]
    for sample, sublayer in np.argwhere(missing * 2 > np.asarray(tokens)[:, None]):
        raise ValueError(
            f"calibration text {sample}: at {sublayers[sublayer]} the residual stream of "
            f"{missing[sample, sublayer]:.0f} of its {tokens[sample]} tokens is zero or not "
            "finite, so nothing can be learned there. Leave the text out, or load the model in a "
            "wider dtype (bfloat16 or float32 instead of float16) if it overflows"
        )
    return missing


def token_digest(samples: Iterable[torch.Tensor]) -> str:
    """Return the digest of the token ids of samples, in their order."""
    joined = hashlib.sha256()
    for ids in samples:
        joined.update(np.ascontiguousarray(ids.cpu().numpy(), dtype="<i8").tobytes())
        joined.update(b"|")
    return joined.hexdigest()
