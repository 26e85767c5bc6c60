"""From a transformers model to a checked graph of each phase, and the Python state it holds for.

- A graph: `graph_key` (what it depends on), `batch_sizes` (for how many rows), `arguments`,
  `example_inputs`, `traced_part` and `traced_functions` (what is traced), `attention` and `rotary`
  (as they are lowered meanwhile), `phase_graph` (captured and cut).
- The proof that it is right: `reference` (the user's model on a few tokens), `layer_memory` (what
  its layers store), `check_graph` (the graph on the same tokens).
- How long it is right: `state` (one state of the model's Python), `states` (those it was in),
  `original` (the user's model, which is watched), `adapters` (what is followed of them),
  `same_objects` (comparisons). `obstacles` names what is in the way of a capture.

Imports `kv_cache`, `plans`, `utils` and `adaskip_passes`.
"""
