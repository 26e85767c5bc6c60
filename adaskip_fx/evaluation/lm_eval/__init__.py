"""An adapter for EleutherAI's lm-evaluation-harness, and its command."""
