"""A folder that `transformers` loads as `GPT2LMHeadModel` with its tokenizer, and back."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mars_lab.data.tokenizer import END_OF_TEXT, Tokenizer
from mars_lab.errors import InputError
from mars_lab.evaluation.new_folder import new_folder
from mars_lab.models.gpt2 import GPT2, GPT2Config
from mars_lab.models.gpt2_hf import from_hf_config, has_biases, load_hf_state_dict, to_hf_config, to_hf_state_dict

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PREFIX = "transformer."


@dataclass(frozen=True)
class HFFolder:
    """What a folder holds: a shape, weights by Hugging Face's names, and a vocabulary."""

    path: Path
    config: GPT2Config
    state: dict[str, Tensor]
    vocabulary: dict[str, int]

    def load_into(self, model: GPT2) -> None:
        """Copy the weights into `model`.

        Raises:
            InputError: it has another shape.
        """
        try:
            load_hf_state_dict(model, self.state)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None


def is_hf_folder(path: Path) -> bool:
    """Whether `path` looks like a model of Hugging Face: a folder whose `config.json` has a `model_type`."""
    try:
        return "model_type" in json.loads((path / _CONFIG).read_text())
    except (OSError, ValueError):
        return False


def write(path: Path, model: GPT2, tokenizer: Tokenizer) -> None:
    """Make the folder `path`, whole or not at all.

    Raises:
        InputError: there is something at `path`.
    """
    end_of_text = tokenizer.end_of_text
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    state = to_hf_state_dict(model)
    del state["lm_head.weight"]  # which is the embedding
    with new_folder(path) as partial:
        _write_json(partial / _CONFIG, {**to_hf_config(model.config, end_of_text), "dtype": dtype})
        _write_json(partial / "generation_config.json", {"bos_token_id": end_of_text, "eos_token_id": end_of_text})
        save_file(state, partial / _WEIGHTS, metadata={"format": "pt"})
        _write_tokenizer(partial, tokenizer.as_hugging_face(), model.config.context_length)


def _write_tokenizer(path: Path, tokenizer: tokenizers.Tokenizer, context_length: int) -> None:
    tokenizer.save(str(path / "tokenizer.json"))
    tokenizer.model.save(str(path))  # vocab.json and merges.txt, for older readers
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    }
    _write_json(path / "tokenizer_config.json", config)


def read(path: Path) -> HFFolder:
    """The model in the folder `path`; it has biases if one of them isn't 0.

    Raises:
        InputError: a file is missing or damaged, or the model isn't one that our GPT-2 can be.
    """
    values = _read_json(path / _CONFIG)
    state = _read_weights(path)
    try:
        config = from_hf_config(values, bias=has_biases(state))
    except InputError as error:
        raise InputError(f"{path / _CONFIG}: {error}") from None
    return HFFolder(path, config, state, _read_vocabulary(path))


def _read_weights(path: Path) -> dict[str, Tensor]:
    if (path / _INDEX).is_file():
        files = sorted(set(_read_json(path / _INDEX).get("weight_map", {}).values()))
    else:
        files = [_WEIGHTS]
    state: dict[str, Tensor] = {}
    for file in files:
        if not (path / file).is_file():
            raise InputError(
                f"{path} has no {file}; older formats are converted with transformers: "
                "GPT2LMHeadModel.from_pretrained(...).save_pretrained(...)"
            )
        try:
            state |= load_file(path / file)
        except SafetensorError as error:
            raise InputError(f"{path / file} is damaged ({error}); restore it") from None
    state = {name if name.startswith((_PREFIX, "lm_head.")) else _PREFIX + name: value for name, value in state.items()}
    if (embedding := state.get("transformer.wte.weight")) is not None:
        head = state.setdefault("lm_head.weight", embedding)
        if not torch.equal(head, embedding):
            raise InputError(f"{path}: lm_head.weight isn't the token embedding, as it is in this GPT-2")
    return {name: value.to(torch.float32) if value.is_floating_point() else value for name, value in state.items()}


def _read_vocabulary(path: Path) -> dict[str, int]:
    if (path / "tokenizer.json").is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab()
        except Exception as error:  # The library raises bare exceptions.
            raise InputError(f"{path / 'tokenizer.json'} is damaged ({error}); restore it") from None
    if (path / "vocab.json").is_file():
        return _read_json(path / "vocab.json")
    raise InputError(f"{path} has neither tokenizer.json nor vocab.json, which say what its tokens mean; add one")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"there is no {path}; give a folder that transformers' save_pretrained has written") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); restore it") from None


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
