"""``adaskip-fx demo``: AdaSkip on a real model, from calibration to what it did to the answers."""
