"""Plans in engines that serve many requests at once: vLLM, by a plugin.

A plan that is the same for prompts and decode (`static_plan`) goes into the model's configuration
(`overrides`). In the engine a table says which modules of a decoder layer are one residual branch
(`layouts`), a skipped branch gets modules that stand in for it (`stand_ins`), and the rewritten
layer is run on small numbers before it is believed (`layer_proof`). `planned_model` does that to an
engine's model, `vllm_plugin` registers it.

Imports `plans` and `utils`; vLLM itself only where vLLM has called it.
"""
