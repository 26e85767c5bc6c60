"""What importing adaskip_fx takes besides torch and transformers, which a user imports anyway."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

_ALONE = "import torch, transformers; transformers.PreTrainedModel, transformers.LlamaForCausalLM"
_WITH = f"{_ALONE}; import adaskip_fx; adaskip_fx.compile, adaskip_fx.calibrate"


def measure(repeats: int = 7) -> dict[str, Any]:
    """Seconds of a fresh interpreter with torch and transformers alone, and with adaskip_fx."""
    took: dict[str, list[float]] = {"alone": [], "with_adaskip_fx": []}
    for _ in range(repeats):
        for name, code in (("alone", _ALONE), ("with_adaskip_fx", _WITH)):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            took[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(times) for name, times in took.items()}
    return {
        "seconds": seconds,
        "ratio": seconds["with_adaskip_fx"] / seconds["alone"],
    }


def summary(result: dict[str, Any]) -> str:
    """One line."""
    seconds = result["seconds"]
    return (
        f"torch and transformers {seconds['alone']:.2f} s, with adaskip_fx "
        f"{seconds['with_adaskip_fx']:.2f} s: {result['ratio']:.2f}x"
    )
