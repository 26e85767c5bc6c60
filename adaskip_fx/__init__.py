"""AdaSkip as a torch.compile / FX graph rewrite for Hugging Face decoders.

profile = adaskip_fx.calibrate(model, tokenizer, texts)
fast = adaskip_fx.compile(model, profile, alpha=1.2)
fast.generate(**inputs, max_new_tokens=64)
"""

from .api import compile
from .calibrate import calibrate
from .plan import SkipPlan, Sublayer
from .policies import AdaSkip
from .profile import Profile

__version__ = "0.1.0"

__all__ = ["AdaSkip", "Profile", "SkipPlan", "Sublayer", "calibrate", "compile"]
