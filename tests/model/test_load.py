"""Which backend, compiler, device and dtype a model is loaded for."""

from __future__ import annotations

import sys

import pytest
import torch

from adaskip_fx.model import load
from adaskip_fx.utils import torch_internals


@pytest.mark.parametrize(
    ("compiler", "wanted", "device", "used"),
    [
        (None, "inductor", "cpu", "eager"),
        ("g++", "inductor", "cpu", "inductor"),
        (None, "aot_eager", "cpu", "aot_eager"),
        (None, "inductor", "cuda", "inductor"),
    ],
)
def test_the_backend_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, compiler: str | None, wanted: str, device: str, used: str
) -> None:
    monkeypatch.setattr(torch_internals, "find_cpp_compiler", lambda: compiler)
    backend, why = load.usable_backend(wanted, torch.device(device))
    assert backend == used
    assert (why is None) == (backend == wanted)
    assert why is None or "no C++ compiler was found" in why


def test_the_compiler_is_the_one_that_inductor_would_use() -> None:
    from torch._inductor import config, cpp_builder

    with config.patch({"cpp.cxx": (None, "/nowhere/c++")}):
        assert torch_internals.find_cpp_compiler() is None
    with config.patch({"cpp.cxx": (None, sys.executable)}):  # anything with --version
        assert torch_internals.find_cpp_compiler() == sys.executable
        assert cpp_builder.get_cpp_compiler() == sys.executable


def test_devices_and_types() -> None:
    cpu = torch.device("cpu")
    assert load.choose_device("cpu") == cpu
    assert load.choose_dtype(None, cpu) is torch.float32
    assert load.choose_dtype(None, torch.device("cuda")) is torch.bfloat16
    assert load.choose_dtype("float16", cpu) is torch.float16
    if torch.cuda.is_available():
        assert load.choose_device("auto").type == "cuda"
    else:
        assert load.choose_device("auto") == cpu
        with pytest.raises(ValueError, match="no CUDA device"):
            load.choose_device("cuda")
