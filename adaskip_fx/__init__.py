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
    from adaskip_passes.errors import AdaskipError, UnsupportedError

    from . import policies
    from .api import compile
    from .calibration.calibrate import calibrate
    from .fitting import fit
    from .model.handle import CompiledModel
    from .plans.skip_plan import SkipPlan
    from .plans.sublayer import Sublayer
    from .policies import AdaSkip
    from .profiles.profile import Profile
    from .speculation.options import Bounded, Lossless

__version__ = "0.1.0"

__all__ = [
    "AdaSkip",
    "AdaskipError",
    "Bounded",
    "CompiledModel",
    "Lossless",
    "Profile",
    "SkipPlan",
    "Sublayer",
    "UnsupportedError",
    "calibrate",
    "compile",
    "fit",
    "policies",
]

# Imported at first use: torch and transformers take seconds, which `adaskip-fx --help` need not.
_HOMES = MappingProxyType(
    {
        "AdaSkip": "adaskip_fx.policies",
        "AdaskipError": "adaskip_passes.errors",
        "Bounded": "adaskip_fx.speculation.options",
        "CompiledModel": "adaskip_fx.model.compiled_model",
        "Lossless": "adaskip_fx.speculation.options",
        "Profile": "adaskip_fx.profiles.profile",
        "SkipPlan": "adaskip_fx.plans.skip_plan",
        "Sublayer": "adaskip_fx.plans.sublayer",
        "UnsupportedError": "adaskip_passes.errors",
        "calibrate": "adaskip_fx.calibration.calibrate",
        "compile": "adaskip_fx.api",
        "fit": "adaskip_fx.fitting",
    }
)


def __getattr__(name: str) -> object:
    if name == "policies":
        return importlib.import_module("adaskip_fx.policies")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
