"""The compiled model as transformers sees it, its `generate`, and loading a model by name.

- `check_model` refuses what cannot be compiled; `subclass` makes a compiled model, `compiled_model`
  says what its class adds, `forward` runs a step and `generation` decodes; `adapted` is what peft
  has put around a decoder.
- `heads` and `host` run a model's own code around the decoder that is compiled, on a `stand_in`.
- `load` finds models for the command line.

Imports `runtime` and what lies below it.
"""
