"""GPT-2 as Hugging Face's `GPT2LMHeadModel` has it: the names of its configuration and the layout of its weights."""

from typing import Any

from torch import Tensor

from mars_lab.errors import InputError
from mars_lab.models.gpt2 import GPT2, GPT2Config

_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_BIASED = (*(name.removesuffix("weight") for name in _CONV1D), "ln_1.", "ln_2.", "ln_f.")
_BUFFERS = (".attn.bias", ".attn.masked_bias")
"""Causal masks, which old files carry."""

_NAMES = {
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "width": "n_embd",
    "context_length": "n_positions",
    "vocab_size": "vocab_size",
    "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx",
}
_DEFAULTS = {
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "n_positions": 1024,
    "vocab_size": 50257,
    "scale_attn_by_inverse_layer_idx": False,
}
"""Hugging Face's, of fields that a `config.json` may leave out."""

_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
"""What our GPT-2 is, the first being Hugging Face's default."""


def to_hf_config(config: GPT2Config, end_of_text: int) -> dict[str, Any]:
    """The `config.json` of `config`; `end_of_text` is the token that begins and ends documents."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for ours, theirs in _NAMES.items()},
        **dict.fromkeys(_DROPOUTS, config.dropout),
        **{name: values[0] for name, values in _FIXED.items()},
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }


def from_hf_config(values: dict[str, Any], *, bias: bool) -> GPT2Config:
    """Undo `to_hf_config`, which leaves the question of biases to the weights.

    Raises:
        InputError: it isn't GPT-2, or has an option that our GPT-2 doesn't.
    """
    if values.get("model_type") != "gpt2":
        raise InputError(f"model_type is {values.get('model_type')!r}; only 'gpt2' can be read")
    shape = {ours: values.get(theirs, _DEFAULTS[theirs]) for ours, theirs in _NAMES.items()}
    width = shape["width"]
    fixed = {**_FIXED, "n_inner": (None, 4 * width)}
    for name, allowed in fixed.items():
        if (value := values.get(name, allowed[0])) not in allowed:
            raise InputError(f"{name} is {value!r}, which this GPT-2 doesn't have: only {_either(allowed)}")
    dropouts = {name: values.get(name, 0.1) for name in _DROPOUTS}
    if len(set(dropouts.values())) > 1:
        raise InputError(f"this GPT-2 has one dropout rate, not {dropouts}; make the three equal")
    return GPT2Config(**shape, bias=bias, dropout=dropouts[_DROPOUTS[0]])


def _either(values: tuple[Any, ...]) -> str:
    return " or ".join(map(repr, values))


def has_biases(hf_state: dict[str, Tensor]) -> bool:
    """Whether any bias isn't 0, so that it takes `bias=True` to keep it."""
    return any(bool(value.any()) for name, value in hf_state.items() if name.endswith(".bias") and not _is_mask(name))


def load_hf_state_dict(model: GPT2, hf_state: dict[str, Tensor]) -> None:
    """Copy the weights of a `GPT2LMHeadModel.state_dict()` into `model`.

    Raises:
        InputError: the shapes differ, or `model` has no biases and `hf_state` holds one that isn't 0.
    """
    own = model.state_dict()
    for name in [name for name in hf_state if name not in own and not _is_mask(name)]:
        if not name.endswith("bias") or hf_state[name].any():
            raise InputError(f"{name} has no place in this model; build it with bias=True to keep biases")
    for name, target in own.items():
        if name not in hf_state:
            raise InputError(f"{name} is missing from the given state dict")
        source = hf_state[name].T if name.endswith(_CONV1D) else hf_state[name]
        if source.shape != target.shape:
            raise InputError(f"{name} has shape {tuple(source.shape)}, this model needs {tuple(target.shape)}")
        target.copy_(source)


def to_hf_state_dict(model: GPT2) -> dict[str, Tensor]:
    """The weights as `GPT2LMHeadModel.load_state_dict` takes them; biases the model lacks are written as 0."""
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        state[name] = value.T.contiguous() if name.endswith(_CONV1D) else value
        layer = name.removesuffix("weight")
        if layer.endswith(_BIASED) and not model.config.bias:
            state[layer + "bias"] = value.new_zeros(value.shape[0])
    return state


def _is_mask(name: str) -> bool:
    return name.endswith(_BUFFERS)
