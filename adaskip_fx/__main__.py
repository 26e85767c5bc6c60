"""``python -m adaskip_fx`` is ``adaskip-fx``."""

from adaskip_fx.cli.app import app

app(prog_name="adaskip-fx")
