"""What studies work on: a model, texts cut into windows of tokens, and profiles of them."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers

from adaskip_fx.api import build
from adaskip_fx.calibration.calibrate import left_out_counts
from adaskip_fx.model.handle import runtime_of
from adaskip_fx.model.load import load, packaged_model
from adaskip_fx.profiles.fingerprint import fingerprint
from adaskip_fx.profiles.profile import Profile
from adaskip_fx.runtime.runtime import Runtime
from adaskip_fx.runtime.similarity import measure_prompt

Half = Literal["first", "second"]
#: modules of the standard library whose source is a text; long ones, of several authors
_MODULES = (
    *("argparse", "ast", "asyncio.base_events", "calendar", "configparser", "csv", "dataclasses"),
    *("datetime", "difflib", "doctest", "enum", "fractions", "http.client", "inspect", "locale"),
    *("logging", "optparse", "pdb", "pickle", "statistics", "subprocess", "tarfile", "typing"),
    *("unittest.mock", "zipfile"),
)


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        model: as `adaskip_fx.model.load.load` takes it; SmolLM2-135M-Instruct when None.
        texts: (name, file) of more texts than the two that Python brings.
        only: names of the texts to use; all when empty.
        calibrate: names of the texts that study_recipe calibrates on; the first two when empty.
        device, dtype: as `load` takes them; see `open_subject` for no dtype.
        backend: of the pieces; see `open_subject` for what None means.
        samples, length: windows of each text's half, and tokens of each; 8 of 2048 on a GPU and
            2 of 256 elsewhere when None.
        alphas: acceleration ratios.
        plans: (name, file) of plans that study_pareto and study_summaries compare too, and
            study_windows, study_kv_cache and study_window_stand_ins take instead of their own.
        keep: folder for the plans that study_recipe and study_windows make; None: they are not
            kept.
        policies, surrogates: which; the usual ones when empty.
        steps: of refinement; of study_recipe's for each alpha, the last for those after it.
        most: sublayers to skip at most, where a study goes through all numbers.
        seed: of whatever is drawn.
        save: gets a result as far as it is, from studies that take long.
        earlier: gives the result that an earlier run has left; None where there is none.
    """

    model: str | None = None
    texts: tuple[tuple[str, Path], ...] = ()
    only: tuple[str, ...] = ()
    calibrate: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str | None = None
    backend: str | None = None
    samples: int | None = None
    length: int | None = None
    alphas: tuple[float, ...] = (1.143, 1.25, 1.333)
    plans: tuple[tuple[str, Path], ...] = ()
    keep: Path | None = None
    policies: tuple[str, ...] = ()
    surrogates: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    most: int = 16
    seed: int = 0
    save: Callable[[dict[str, Any]], None] = lambda result: None
    earlier: Callable[[], dict[str, Any] | None] = lambda: None


@dataclass(frozen=True, eq=False)
class Text:
    """One text.

    Attributes:
        name: in tables and pictures.
        content: all of it; sha256: of its UTF-8 bytes.
        tokens: int64 [n].
    """

    name: str
    content: str
    tokens: torch.Tensor

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()

    def about(self) -> dict[str, Any]:
        """For a result."""
        count = len(self.tokens)
        return {"name": self.name, "sha256": self.sha256, "tokens": count}

    def windows(self, half: Half, count: int, length: int) -> list[torch.Tensor]:
        """At most `count` windows int64 [1, length], spread evenly over one half of the text.

        Halves have no token in common: calibrate on one and evaluate on the other. ValueError for
        a half that is shorter than one window.
        """
        middle = len(self.tokens) // 2
        part = self.tokens[:middle] if half == "first" else self.tokens[middle:]
        fit = min(count, len(part) // length)
        if fit < 1:
            raise ValueError(
                f"text {self.name!r}: a half has {len(part)} tokens, fewer than one window of "
                f"{length}; use a longer text, or a smaller --length"
            )
        room = (len(part) - length) // max(fit - 1, 1) if fit > 1 else 0
        return [part[i * room : i * room + length].unsqueeze(0) for i in range(fit)]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that is studied, compiled so that any plan can be set.

    Attributes:
        name: of the model.
        model: as it is; compiled: the same with plans.
        tokenizer: None for models that read bytes.
        texts: what it reads.
        options: what was asked for; samples, length: windows of each half, tokens of each.
    """

    name: str
    model: Any
    compiled: Any
    tokenizer: Any
    texts: tuple[Text, ...]
    options: Options
    samples: int
    length: int

    @property
    def runtime(self) -> Runtime:
        runtime: Runtime = runtime_of(self.compiled)
        return runtime

    @property
    def calibrated(self) -> tuple[str, ...]:
        """Names of the texts to calibrate on, where there are several."""
        return self.options.calibrate or tuple(text.name for text in self.texts[:2])

    @property
    def decoded(self) -> int:
        """Tokens that are decoded to see what decoding costs, and how fast it is."""
        return 48 if self.device.type == "cuda" else 8

    @property
    def device(self) -> torch.device:
        return self.runtime.device

    def windows(self, text: Text, half: Half) -> list[torch.Tensor]:
        """The half's windows on the model's device."""
        cut = text.windows(half, self.samples, self.length)
        return [window.to(self.device) for window in cut]

    def held_out(self, known: Sequence[Text]) -> dict[str, list[torch.Tensor]]:
        """Windows to read, by text, where `known` are what something was chosen or fitted on.

        Both halves of the other texts; second halves of all where there is no other.
        """
        others = [text for text in self.texts if text not in known]
        cut = {text.name: self.windows(text, "second") for text in others or self.texts}
        for text in others:
            cut[text.name] += self.windows(text, "first")
        return cut

    @functools.cache  # noqa: B019  # a subject lives as long as the process
    def profile(self, text: Text, half: Half = "first") -> Profile:
        """What calibration on one half of a text measures."""
        windows = self.windows(text, half)
        count = len(self.runtime.sublayers)
        readings = [measure_prompt(self.runtime, ids, layers=True) for ids in windows]
        moments = np.stack([reading[:, 0].double().cpu().numpy() for reading in readings])
        return Profile(
            self.runtime.sublayers,
            moments[:, :count],
            fingerprint(self.model),
            {"torch": str(torch.__version__), "transformers": transformers.__version__},
            {"text": text.name, "sha256": text.sha256, "half": half, "length": self.length},
            layers=moments[:, count:],
            left_out=left_out_counts(
                self.runtime.sublayers, moments[:, :count], [ids.numel() for ids in windows]
            ),
        )

    def about(self) -> dict[str, Any]:
        """Model, texts and seed, for a result."""
        return {
            "model": {
                "name": self.name,
                "type": self.model.config.model_type,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "sublayers": len(self.runtime.sublayers),
                "dtype": str(self.model.dtype).removeprefix("torch."),
            },
            "texts": [text.about() for text in self.texts],
            "windows": {"a_half": self.samples, "tokens": self.length},
            "seed": self.options.seed,
        }


@functools.cache
def open_subject(options: Options, timed: bool = False) -> Subject:
    """Load and compile what `options` name; once in a process.

    timed: the study decodes or measures speed, so that on a GPU Inductor compiles (if the options
        don't say otherwise) and the model is in bfloat16. Else pieces run as they were captured, in
        float32.
    """
    dtype = options.dtype or (None if timed else "float32")
    loaded = _load(options.model or str(packaged_model()), options.device, dtype)
    texts = read_texts(options, loaded.tokenizer)
    name = Path(loaded.name).stem
    return subject_of(name, loaded.model, loaded.tokenizer, texts, options, timed)


_load = functools.cache(load)


def subject_of(
    name: str, model: Any, tokenizer: Any, texts: Sequence[Text], options: Options, timed: bool
) -> Subject:
    """A subject of a model in memory; `timed` as for `open_subject`."""
    on_gpu = model.device.type == "cuda"
    backend = options.backend or ("inductor" if on_gpu and timed else "eager")
    compiled = build(model, None, backend=backend)
    samples = options.samples or (8 if on_gpu else 2)
    length = options.length or (2048 if on_gpu else 256)
    return Subject(name, model, compiled, tokenizer, tuple(texts), options, samples, length)


def read_texts(options: Options, tokenizer: Any) -> list[Text]:
    """Python's reference and library, and the files that were named; ValueError for a bad one."""

    def encode(content: str) -> torch.Tensor:
        ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    sources: dict[str, Callable[[], str]] = {"pydoc": reference, "stdlib": library}
    sources |= {name: functools.partial(_read, path) for name, path in options.texts}
    unknown = [name for name in options.only if name not in sources]
    if unknown:
        raise ValueError(f"no text {unknown[0]!r}; there are {', '.join(sources)}")
    chosen = {n: read() for n, read in sources.items() if not options.only or n in options.only}
    return [Text(name, content, encode(content)) for name, content in chosen.items()]


def reference() -> str:
    """The Python reference in ``pydoc_data.topics``: English prose about a language."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def library() -> str:
    """Source of the standard library: code."""
    import importlib

    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in _MODULES)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from error
