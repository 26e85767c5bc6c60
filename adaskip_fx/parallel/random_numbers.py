"""The first rank's random numbers on all ranks, so that all of them draw its tokens."""

from __future__ import annotations

import torch

from .ranks import Ranks


def share_random_numbers(ranks: Ranks, device: torch.device) -> None:
    """Set torch's generators to the state that they have on rank 0: the CPU's, and the device's.

    Logits are the same on all ranks, so what is drawn of them is as well.
    """
    if ranks.alone:
        return
    on_gpu = device.type == "cuda"

    def states() -> list[bytes]:
        found = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_gpu else [])]
        return [bytes(state.numpy()) for state in found]

    cpu, *gpu = (
        torch.frombuffer(bytearray(s), dtype=torch.uint8)
        for s in ranks.first("the random numbers of a request", states)
    )
    torch.set_rng_state(cpu)
    for state in gpu:
        torch.cuda.set_rng_state(state, device)
