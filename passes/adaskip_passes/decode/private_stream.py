"""CUDA streams that nobody else has.

PyTorch hands out its streams from a pool of 32 in turn, so that whoever makes many has some twice.
What a caller launches on a stream while another thread captures there becomes part of that graph
instead of being run. Streams to capture on are therefore made by the driver.
"""

from __future__ import annotations

import importlib
from collections import defaultdict

import torch

#: Streams whose owners are gone: the next ones get them, since memory is cached by stream.
_idle: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


def private_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream of a CUDA device that nobody else has, until it is given back.

    Without NVIDIA's bindings, which PyTorch's CUDA builds install, it is one of PyTorch's pool.
    """
    number = device.index if device.index is not None else torch.cuda.current_device()
    device = torch.device("cuda", number)
    try:
        return _idle[device].pop()
    except IndexError:
        pass
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError:
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        torch.cuda.current_stream(device).query()  # there is a context from here on
        error, stream = driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cuStreamCreate failed: {error}")
    return torch.cuda.ExternalStream(int(stream), device)  # type: ignore[no-untyped-call]


def give_back(stream: torch.cuda.Stream) -> None:
    """Let others have a stream of `private_stream`, after what was begun on it."""
    _idle[stream.device].append(stream)
