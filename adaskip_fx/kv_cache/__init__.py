"""What a request stores: its buffers, the cache that transformers sees, and the views of a step.

- Buffers: `layer_spec` (what a layer stores), `buffers`, `buffer_pool` (leased to one request).
- What is let go: `retention` (what windows show), `sliding`; its memory: `regions` (of a layer),
  `growing_memory`, `pieces`, of a GPU `mapped_memory` and of a CPU `host_memory`.
- A request: `request_memory` (lengths, rows, steps), `cache` (the same as transformers' cache),
  `layers` (``cache.layers``), `owner` (the runtime that made it), `argument_names` (what its
  argument is called), `read_again` (its last tokens, by another plan).
- A step: `views`. Other caches: `adopt_cache` (a caller's), `saved` (in a file), `saved_shares` (in
  a file for each rank).

Imports `profiles`, `plans` and `utils`.
"""
