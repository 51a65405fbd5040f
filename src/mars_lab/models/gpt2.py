"""GPT-2 on one page.

Every name in the state dict is the one Hugging Face's `GPT2LMHeadModel` uses; the linear weights are stored
(out, in) as `torch.nn.Linear` does, where Hugging Face's `Conv1D` has (in, out).

A suffix on a name gives its shape:
    B batch    T position    D width    H head    K width of one head (D = H * K)    V vocabulary
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mars_lab.errors import InputError
from mars_lab.models.chunked_cross_entropy import chunked_cross_entropy


@dataclass(frozen=True)
class GPT2Config:
    """The shape of the model, and what it holds in memory. The defaults are the default recipe's, not GPT-2 small's."""

    num_layers: int = 4
    num_heads: int = 3
    width: int = 192
    context_length: int = 256
    """Longest sequence, in tokens."""
    vocab_size: int = 4096
    """Rows of the embedding; at least as many as the tokenizer has entries."""
    bias: bool = False
    """Biases in linear layers and layer norms."""
    dropout: float = 0.0
    scale_attn_by_inverse_layer_idx: bool = True
    """Divide the attention logits of layer i (from 0) by i + 1."""
    loss_chunk_size: int = 1024
    """Tokens whose logits exist at once while the loss is computed; 0 means all of a batch."""
    activation_checkpointing: bool = False
    """Keep only what enters each block, and compute the rest of it again in the backward pass."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "width", "context_length", "vocab_size"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise InputError(
                f"model.width ({self.width}) must be a multiple of model.num_heads ({self.num_heads}); "
                f"the nearest that fits is {max(1, round(self.width / self.num_heads)) * self.num_heads}"
            )
        if self.loss_chunk_size < 0:
            raise InputError(f"model.loss_chunk_size must be at least 0, got {self.loss_chunk_size}")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"model.dropout must be in [0, 1), got {self.dropout}")


class Attention(nn.Module):
    """Causal self-attention; `c_attn` holds Q, K and V, stacked in this order along its rows."""

    def __init__(self, config: GPT2Config, layer_index: int) -> None:
        super().__init__()
        self.head_width = config.width // config.num_heads
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.c_proj = nn.Linear(config.width, config.width, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.scale = 1.0 / math.sqrt(self.head_width)
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer_index + 1

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (
            part_BTD.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for part_BTD in self.c_attn(x_BTD).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BHTK, v_BHTK, dropout_p=dropout, is_causal=True, scale=self.scale
        )
        return self.resid_dropout(self.c_proj(y_BHTK.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Two linear layers around the tanh form of GELU."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.width, config.width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x_BTD), approximate="tanh")))


class Block(nn.Module):
    """Pre-norm: x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, config: GPT2Config, layer_index: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, bias=config.bias)
        self.attn = Attention(config, layer_index)
        self.ln_2 = nn.LayerNorm(config.width, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD))
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class Transformer(nn.Module):
    """Token and position embeddings, the blocks, the last norm."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.wpe = nn.Embedding(config.context_length, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.width, bias=config.bias)
        self.activation_checkpointing = config.activation_checkpointing

    def forward(self, tokens_BT: Tensor) -> Tensor:
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.drop(self.wte(tokens_BT) + self.wpe(positions_T))
        for block in self.h:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTD = cast(Tensor, checkpoint(block, x_BTD, use_reentrant=False))
            else:
                x_BTD = block(x_BTD)
        return self.ln_f(x_BTD)


class GPT2(nn.Module):
    """GPT-2 with its output head tied to the token embedding (Radford et al., 2019).

    Weights start as GPT-2's: normal with deviation 0.02, divided by sqrt(2 * num_layers) for the two
    projections of each block that write into the residual stream; biases 0, norms 1.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                num_residual = 2 * config.num_layers if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(num_residual))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the token that follows each position; T is at most `context_length`.

        With `targets_BT`, the tokens that do follow, the mean cross-entropy in nats instead.
        """
        if tokens_BT.shape[1] > self.config.context_length:
            raise ValueError(
                f"a sequence of {tokens_BT.shape[1]} tokens exceeds context_length "
                f"({self.config.context_length}); pass its last {self.config.context_length} tokens"
            )
        x_BTD = self.transformer(tokens_BT)
        return self.lm_head(x_BTD) if targets_BT is None else self._loss(x_BTD.flatten(0, 1), targets_BT.flatten())

    def _loss(self, x_ND: Tensor, targets_N: Tensor) -> Tensor:
        if not self.config.loss_chunk_size:
            logits_NV = self.lm_head(x_ND)
            return F.cross_entropy(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), targets_N)
        weight_VD = self.lm_head.weight
        if isinstance(weight_VD, DTensor):  # tensor parallelism, under which every process has all of it
            weight_VD = weight_VD.to_local()
        return chunked_cross_entropy(x_ND, weight_VD, targets_N, self.config.loss_chunk_size)


@torch.no_grad()
def generate(
    model: GPT2, prompt_T: Tensor, num_tokens: int, *, temperature: float, top_k: int | None, seed: int
) -> Tensor:
    """`prompt_T` (int64, at least one token) followed by `num_tokens` sampled ones.

    The whole window is recomputed for each token: at this size a key-value cache would cost more to read than
    it saves to run. `temperature` 0 takes the likeliest token; `top_k` keeps the k likeliest, None keeps all.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator(device=prompt_T.device).manual_seed(seed)
    tokens_T = prompt_T
    for _ in range(num_tokens):
        logits_V = model(tokens_T[None, -model.config.context_length :])[0, -1].float()
        if top_k is not None and top_k < logits_V.numel():
            logits_V[logits_V < logits_V.topk(top_k).values[-1]] = -torch.inf
        if temperature == 0:
            next_1 = logits_V.argmax().view(1)
        else:
            next_1 = torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator)
        tokens_T = torch.cat((tokens_T, next_1))
    model.train(was_training)
    return tokens_T
