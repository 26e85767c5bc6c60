"""AdaSkip as a torch.compile / FX graph rewrite for Hugging Face decoders.

profile = adaskip_fx.calibrate(model, tokenizer, texts)
fast = adaskip_fx.compile(model, profile, alpha=1.2)
fast.generate(**inputs, max_new_tokens=64)
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import compile
    from .calibration.calibrate import calibrate
    from .fitting import fit
    from .plans.skip_plan import SkipPlan
    from .plans.sublayer import Sublayer
    from .policies import AdaSkip
    from .profiles.profile import Profile

__version__ = "0.1.0"

__all__ = ["AdaSkip", "Profile", "SkipPlan", "Sublayer", "calibrate", "compile", "fit"]

# Imported at first use: torch and transformers take seconds, which `adaskip-fx --help` need not.
_HOMES = MappingProxyType(
    {
        "AdaSkip": "policies",
        "Profile": "profiles.profile",
        "SkipPlan": "plans.skip_plan",
        "Sublayer": "plans.sublayer",
        "calibrate": "calibration.calibrate",
        "compile": "api",
        "fit": "fitting",
    }
)


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
