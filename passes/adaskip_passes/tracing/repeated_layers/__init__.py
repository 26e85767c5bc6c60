"""Of layers that are alike two are traced, and the others copied."""
