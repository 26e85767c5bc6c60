"""What goes wrong between ranks."""

from __future__ import annotations

from adaskip_passes.errors import AdaskipError


class RanksError(AdaskipError, RuntimeError):
    """Ranks that run one model together do not agree, or one of them failed; the text says which.

    A model of which one rank failed in the middle of a step cannot go on: its ranks are no longer
    at the same place. Where they only disagreed, nothing was run, and every rank has raised.
    """
