"""Decoders that are not in transformers, written as a user would write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class OwnConfig(PreTrainedConfig):
    model_type = "own"

    def __init__(self, layers: int = 3, hidden: int = 16, heads: int = 2, **more: Any) -> None:
        self.num_hidden_layers = layers
        self.hidden_size = hidden
        self.num_attention_heads = heads
        self.vocab_size = 31
        super().__init__(**more)


class OwnAttention(nn.Module):
    """Causal attention with learned distances and a K/V cache; it knows nothing of masks."""

    def __init__(self, config: OwnConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.layer = config.num_attention_heads, layer
        self.norm = nn.LayerNorm(config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, cache: Any, layer: int | None = None) -> torch.Tensor:
        batch, tokens, hidden = x.shape
        split = self.qkv(self.norm(x)).view(batch, tokens, 3, self.heads, hidden // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        if cache is not None:
            k, v = cache.update(k, v, self.layer if layer is None else layer)
        stored = k.shape[2]
        places = torch.arange(stored, device=x.device)
        seen = places <= places[stored - tokens :].unsqueeze(1)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=seen)
        result: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(x.shape))
        return result


class OwnFeedForward(nn.Module):
    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.down = nn.Linear(3 * config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(silu(self.up(self.norm(x))))
        return result


class OwnLayer(nn.Module):
    """Pre-norm: attention, then FFN."""

    def __init__(self, config: OwnConfig, layer: int) -> None:
        super().__init__()
        self.mixing = OwnAttention(config, layer)
        self.thinking = OwnFeedForward(config)

    def forward(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        x = x + self.mixing(x, cache)
        return x + self.thinking(x)


class OwnDecoder(PreTrainedModel, GenerationMixin):
    """A decoder with residual sublayers under names of its own."""

    config_class = OwnConfig
    layer_class: type[nn.Module] = OwnLayer

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(64, config.hidden_size)
        self.blocks = nn.ModuleList(
            self.layer_class(config, i) for i in range(config.num_hidden_layers)
        )
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def run(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, cache)
        logits: torch.Tensor = self.head(x)
        return logits

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if position_ids is None:
            begin = past_key_values.get_seq_length() if past_key_values is not None else 0
            end = begin + input_ids.shape[1]
            position_ids = torch.arange(begin, end, device=input_ids.device).unsqueeze(0)
        logits = self.run(self.embed(input_ids) + self.places(position_ids), past_key_values)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


class OwnParallelLayer(OwnLayer):
    """Attention and FFN in parallel."""

    def forward(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        return x + self.mixing(x, cache) + self.thinking(x)


class OwnParallelDecoder(OwnDecoder):
    layer_class = OwnParallelLayer


class DeepSupervision(OwnDecoder):
    """The head reads the stream after every layer."""

    def run(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        logits: torch.Tensor = self.head(x)
        for number, block in enumerate(self.blocks):
            x = block(x, cache)
            logits = logits + self.head(x) * (number + 1)
        return logits


class EarlyExit(OwnDecoder):
    """A second head half-way, whose logits are mixed in by its confidence."""

    def run(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        half = None
        for number, block in enumerate(self.blocks):
            x = block(x, cache)
            if number == 1:
                half = self.head(x)
        assert half is not None
        sure = torch.softmax(half, -1).amax(-1, keepdim=True)
        logits: torch.Tensor = sure * half + (1 - sure) * self.head(x)
        return logits


class FeedsTwoLayers(OwnDecoder):
    """The output of layer 1's attention is read by layer 2's as well."""

    def run(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        blocks: Any = self.blocks
        x = blocks[0](x, cache)
        mixed = blocks[1].mixing(x, cache)
        x = x + mixed
        x = x + blocks[1].thinking(x)
        x = x + blocks[2].mixing(x + mixed, cache)
        x = x + blocks[2].thinking(x)
        logits: torch.Tensor = self.head(x)
        return logits


class SharedLayer(OwnDecoder):
    """One layer, run three times, with a cache for each time."""

    def run(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        block: Any = self.blocks[0]
        for turn in range(3):
            x = x + block.mixing(x, cache, turn)
            x = x + block.thinking(x)
        logits: torch.Tensor = self.head(x)
        return logits


def own(kind: type[OwnDecoder] = OwnDecoder, **sizes: Any) -> Any:
    """A model with weights so large that every sublayer matters."""
    torch.manual_seed(0)
    model = kind(OwnConfig(**sizes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.uniform_(-0.4, 0.4)
    return model
