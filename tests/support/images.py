"""Tiny models of vision and language, and prompts with images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

IMAGE, START, PAD = 60, 58, 0
TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
}


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(**VISION, patch_size=8, projection_dim=32)
    text = transformers.LlamaConfig(**TEXT)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE,
            image_token_id=IMAGE,
            vision_feature_layer=-1,
        )
    )


def qwen() -> Any:
    """Of the newer kind: positions in three axes, which images have a plane of."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
    vision = {
        **{"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4},
        **{"out_hidden_size": 32, "patch_size": 4, "spatial_merge_size": 2, "window_size": 16},
        "fullatt_block_indexes": [0],
    }
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": rope},
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=59,
            vision_start_token_id=START,
        )
    )


def gemma3() -> Any:
    """Tokens of an image see one another."""
    layers = ["sliding_attention", "full_attention"]
    more = {"head_dim": 8, "sliding_window": 16, "layer_types": layers}
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config={**TEXT, **more},
            vision_config={**VISION, "patch_size": 4},
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            image_token_id=IMAGE,
            boi_token_index=START,
            eoi_token_index=59,
        )
    )


def prompt(kind: str, rows: int = 1) -> dict[str, torch.Tensor]:
    """A text with an image; of two rows, the second begins with padding."""
    drawn = torch.Generator().manual_seed(0)
    tokens = 8 if kind == "qwen" else 4
    begin = [5, 9, START] if kind != "llava" else [5, 9]
    row = [*begin, *[IMAGE] * tokens, 7, 8, 9]
    ids = torch.tensor([row, [PAD, *row[1:-1], 12]][:rows])
    given = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if kind == "qwen":
        given["image_grid_thw"] = torch.tensor([[1, 4, 8]] * rows)
        given["pixel_values"] = torch.randn(32 * rows, 96, generator=drawn)
        given["mm_token_type_ids"] = (ids == IMAGE).int()
    else:
        given["pixel_values"] = torch.randn(rows, 3, 16, 16, generator=drawn)
    if kind == "gemma3":
        given["token_type_ids"] = (ids == IMAGE).long()
    return given


MAKE: dict[str, Callable[[], Any]] = {"llava": llava, "qwen": qwen, "gemma3": gemma3}


def made(kind: str) -> Any:
    """The same model each time, which has seen nothing yet."""
    torch.manual_seed(0)
    return MAKE[kind]().eval().requires_grad_(False)
