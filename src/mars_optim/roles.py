"""What a parameter is within its model: embedding, head, convolution, fused QKV, experts, LoRA factor, matrix."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from .polar import MatrixView

_HEAD_NAMES = {
    "lm_head",
    "head",
    "heads",
    "classifier",
    "score",
    "fc_out",
    "unembed",
    "embed_out",
    "output_projection",
}
_EMBEDDING_NAME = re.compile(r"(^|[._])(embed\w*|\w*embedding\w*|wte|wpe|pos_?emb\w*|\w*_token|\w*_tokens)([._]|$)")
_FUSED_QKV_NAME = re.compile(
    r"(^|[._])(c_attn|w?qkv\w*|\w*_qkv|in_proj|in_proj_weight|attn_qkv_proj)([._]|$)", re.IGNORECASE
)
# Bloom and GPT-NeoX interleave Q, K and V head by head, so that thirds of the rows are not Q, K and V.
_INTERLEAVED_QKV_NAME = re.compile(r"(^|[._])query_key_value([._]|$)")
_BIAS_NAME = re.compile(r"(^|[._])bias(_table)?$")
_POSITION_NAME = re.compile(r"pos|wpe|token_type|relative", re.IGNORECASE)
_LORA_NAME = re.compile(r"(^|[._])lora_(embedding_)?([AaBb])([._]|$)")


@dataclass(frozen=True)
class Found:
    """A trainable parameter: all its names, the modules that own it, and what the model has beside it."""

    names: tuple[str, ...]
    parameter: nn.Parameter
    owners: tuple[nn.Module, ...]
    vocabulary_sizes: frozenset[int]
    last_linear: nn.Module | None
    heads: frozenset[nn.Module]
    lora_partner: str | None = None


@dataclass(frozen=True)
class Role:
    """How to treat a parameter under a matrix type: `view` None means AdamW."""

    view: MatrixView | None
    why: str
    transposed: bool = False
    is_override: bool = False
    hyperparameters: tuple[tuple[str, Any], ...] = ()


def survey(model: nn.Module) -> tuple[list[Found], int]:
    """Return every trainable parameter once, in the model's order, and the number of frozen tensors."""
    names: dict[nn.Parameter, list[str]] = {}
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    modules = cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
    for module_name, module in modules:
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            names.setdefault(parameter, []).append(f"{module_name}.{name}" if module_name else name)
            owners.setdefault(parameter, []).append(module)
    sizes: set[int] = set()
    last_linear: nn.Module | None = None
    for name, module in cast("Iterable[tuple[str, nn.Module]]", model.named_modules()):
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and not _POSITION_NAME.search(name.rpartition(".")[2]):
            sizes.add(module.num_embeddings)
        last_linear = module if isinstance(module, nn.Linear) else last_linear
    get_head = getattr(model, "get_output_embeddings", None)
    heads = frozenset(h for h in [get_head() if callable(get_head) else None] if isinstance(h, nn.Module))
    trainable = [p for p in names if p.requires_grad]
    partners = _lora_partners(name for p in trainable for name in names[p])
    found = [
        Found(tuple(names[p]), p, tuple(owners[p]), frozenset(sizes), last_linear, heads, partners.get(names[p][0]))
        for p in trainable
    ]
    return found, len(names) - len(trainable)


def role_of(found: Found, num_heads: int | None) -> Role:
    """Decide how a matrix type treats a parameter; the first rule that applies.

    Raises:
        ValueError: `num_heads` does not divide a fused QKV tensor.
    """
    p = found.parameter
    if p.ndim < 2:
        return Role(None, "fewer than two dimensions")
    if p.is_complex():
        return Role(None, "complex: no matrix type takes it")
    not_a_matrix = _embedding(found) or _head(found) or _vector(found)
    if not_a_matrix:
        return Role(None, not_a_matrix)
    if any(isinstance(owner, nn.modules.conv._ConvNd) for owner in found.owners):  # pyright: ignore[reportPrivateUsage]
        if p.shape[1] == 1 and any(getattr(owner, "groups", 1) > 1 for owner in found.owners):
            return Role(None, "depthwise convolution: its rows are unrelated filters")
        return Role("flatten", "convolution as (out, in*kernel)")
    lora = next((m for m in map(_LORA_NAME.search, found.names) if m), None)
    if lora:
        factor = lora[3].upper()
        partner = f"with {found.lora_partner}" if found.lora_partner else "its partner is frozen or missing"
        return Role("flatten", f"LoRA factor {factor}, {partner}")
    if p.ndim == 3:
        return Role("stack", "three dimensions outside a convolution: a stack of matrices, one an expert")
    transposed = any(type(owner).__name__ == "Conv1D" for owner in found.owners)  # transformers' (in, out) Linear
    qkv = _fused_qkv(found, num_heads, dim=1 if transposed else 0)
    if qkv:
        return Role(qkv[0], qkv[1], transposed)
    return Role("flatten", "matrix" if p.ndim == 2 else "more than two dimensions, flattened", transposed)


def _vector(found: Found) -> str | None:
    shape = found.parameter.shape
    if any("Norm" in type(owner).__name__ for owner in found.owners):
        return "normalisation"
    if any(_BIAS_NAME.search(name) or name.endswith("_bias") for name in found.names):
        return "bias"
    if found.parameter.numel() == max(shape):
        return "a vector: all dimensions but one are 1"
    if len(shape) == 3 and shape[0] == 1:
        return "one table with a leading dimension of 1, not experts"
    return None


def _embedding(found: Found) -> str | None:
    if any(isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) for owner in found.owners):
        return "embedding" + (" tied with the head" if len(found.names) > 1 else "")
    raw = not any(isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd)) for owner in found.owners)  # pyright: ignore[reportPrivateUsage]
    if raw and any(_EMBEDDING_NAME.search(name) for name in found.names):
        return "embedding, by its name"
    return None


def _head(found: Found) -> str | None:
    if any(owner in found.heads for owner in found.owners):
        return "output head of the model"
    for name, owner in zip(found.names, found.owners, strict=True):
        if owner is found.last_linear and found.parameter.shape[0] in found.vocabulary_sizes:
            return "output head: the last linear layer, as many rows as the vocabulary"
        if owner is found.last_linear and name == "fc.weight":
            return "output head: the last linear layer, by its name"
        if isinstance(owner, nn.Linear) and _HEAD_NAMES & set(name.split(".")[-3:-1]):
            return "output head, by its name"
    return None


def _fused_qkv(found: Found, num_heads: int | None, *, dim: int) -> tuple[MatrixView, str] | None:
    p = found.parameter
    long, short = p.shape[dim], p.shape[1 - dim]
    interleaved = any(_INTERLEAVED_QKV_NAME.search(name) for name in found.names)
    if not interleaved and not any(_FUSED_QKV_NAME.search(name) for name in found.names):
        return None
    if long != 3 * short:
        return "flatten", f"looks like fused QKV, but {long} is not 3 x {short}: give matrix_view in overrides"
    if num_heads is not None:
        if long % (3 * num_heads):
            raise ValueError(
                f"num_heads={num_heads} does not split parameter {found.names[0]} of shape {tuple(p.shape)}: "
                f"{long} is not a multiple of {3 * num_heads}; give its sizes in overrides as matrix_view"
            )
        size = long // (3 * num_heads)
        return ("split", dim, (size,) * (3 * num_heads)), f"fused QKV, {num_heads} heads each by itself"
    if interleaved:
        return "flatten", "fused QKV interleaved by head: give num_heads to split it"
    return ("split", dim, (short,) * 3), "fused QKV: Q, K and V each by itself"


def _lora_partners(names: Iterable[str]) -> dict[str, str]:
    """Map each LoRA factor's name to its trainable partner's."""
    known = set(names)
    partners: dict[str, str] = {}
    for name in known:
        match = _LORA_NAME.search(name)
        if match:
            letter = {"A": "B", "B": "A", "a": "b", "b": "a"}[match[3]]
            partner = name[: match.start(3)] + letter + name[match.end(3) :]
            if partner in known:
                partners[name] = partner
    return partners
