"""What a measurement was taken under: the device and the versions."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import transformers

import adaskip_fx

from ..latency.table import device_name


def environment(placed: Any) -> dict[str, Any]:
    """Return what numbers depend on besides the model and the code that is timed.

    Args:
        placed: a model or a tensor on the device that is meant.

    Returns:
        `device` (the GPU's name, or CPU with its architecture), `processor` (of the host),
        `threads` (of torch) and `cores`, and the versions `python`, `torch`, `transformers` and
        `adaskip_fx`; JSON-compatible.
    """
    return {
        "device": device_name(placed),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "adaskip_fx": adaskip_fx.__version__,
    }


def processor_name() -> str:
    """Return the processor's name where the system tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            names = [line.split(":", 1)[1].strip() for line in info if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
