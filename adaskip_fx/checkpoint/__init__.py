"""A plan as a plain checkpoint: a folder that any engine loads, without adaskip_fx.

What of a plan can be said there is found out first (`foldable`). The sublayers that run are packed
into as few decoder layers as they fit (`packing`), whose weights are the model's (`weights`), under
a configuration that was cut to them (`configuration`); a table says which tensors belong to which
branch (`layout`). What was written is loaded again and compared with the compiled model (`export`).

Imports `api` and what is below it; nothing but `cli` imports it.
"""

from .export import ExportedCheckpoint, export_checkpoint

__all__ = ["ExportedCheckpoint", "export_checkpoint"]
