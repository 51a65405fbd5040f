"""Language modelling: GPT-2 on a corpus of text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mars_lab.data import tokens
from mars_lab.data.batches import ORDER, Windows, evaluation_sequences
from mars_lab.data.tokens import DataConfig
from mars_lab.errors import InputError
from mars_lab.models import tensor_parallel
from mars_lab.models.gpt2 import GPT2, GPT2Config, generate
from mars_lab.ranks import Ranks


@dataclass(frozen=True)
class LanguageConfig:
    """A model, its text, and how it is judged."""

    model: GPT2Config = field(default_factory=GPT2Config)
    data: DataConfig = field(default_factory=DataConfig)
    eval_sequences: int = 256
    """Validation windows, spread evenly over the held-out text and the same each time; 0 means all of it."""
    eval_batch_size: int = 32
    """Windows evaluated at once; it changes memory and time, not the loss."""
    sample_tokens: int = 200
    """Length of the text written at the end of a run; 0 writes none."""
    sample_prompt: str = "My fellow citizens,"


class LanguageTask:
    """Next-token prediction; a sequence is one window of `context_length` targets."""

    def __init__(self, config: LanguageConfig, seed: int) -> None:
        self.config = config
        self.data = tokens.load(config.data)
        length = config.model.context_length
        if self.data.vocab_size > config.model.vocab_size:
            raise InputError(
                f"model.vocab_size ({config.model.vocab_size}) is smaller than the tokenizer "
                f"({self.data.vocab_size} entries); raise it, or lower data.tokenizer_size (text only)"
            )
        if config.sample_tokens:
            self._require_tokenizer()
        self._windows = Windows(self.data.train, length, seed)
        self._eval_sequences = evaluation_sequences(self.data.val, length, config.eval_sequences)

    def _require_tokenizer(self) -> None:
        try:
            _ = self.data.tokenizer
        except InputError as error:
            raise InputError(f"{error}; or write no sample at the end: --sample-tokens 0") from None

    @property
    def fingerprint(self) -> str:
        """A line a token file."""
        return f"order {ORDER}\n{self.data.fingerprint}"

    @property
    def unit(self) -> str:
        """What has a label of its own."""
        return "token"

    @property
    def tokens_per_sequence(self) -> int:
        """The context length."""
        return self.config.model.context_length

    def build_model(self) -> GPT2:
        """GPT-2 with fresh weights."""
        return GPT2(self.config.model)

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The blocks."""
        return list(cast(GPT2, model).transformer.h)

    def split_layers(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Attention by heads, the MLP by hidden units."""
        tensor_parallel.split(cast(GPT2, model), mesh)

    def batch(self, first: int, count: int) -> Tensor:
        """Windows of tokens: int64 (count, context_length + 1)."""
        return self._windows.sequences(first, count)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean cross-entropy per token, in nats."""
        return model(batch[:, :-1], batch[:, 1:])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, ranks: Ranks) -> dict[str, float]:
        """Mean cross-entropy per held-out token, in nats, as `val_loss`."""
        model.eval()
        total = 0.0
        for batch in self._eval_sequences.split(self.config.eval_batch_size):
            rows, count = ranks.weighted_rows(batch)
            total += self.loss(model, rows.to(ranks.device)).item() * count
        model.train()
        # Processes with the same share count its rows equally often, above and below.
        count = len(self._eval_sequences) * ranks.size / ranks.num_shares
        return {"val_loss": ranks.sums([total])[0] / count}

    def sample(self, model: nn.Module, device: str) -> str:
        """Text that continues `sample_prompt`; empty, and without need of a tokenizer, if no tokens are wanted."""
        if not self.config.sample_tokens:
            return ""
        prompt, num_tokens = self.config.sample_prompt, self.config.sample_tokens
        return continue_text(self, cast(GPT2, model), prompt, num_tokens, device=device)


def continue_text(
    task: LanguageTask,
    model: GPT2,
    prompt: str,
    num_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 0,
    device: str = "cpu",
) -> str:
    """`prompt` and `num_tokens` tokens that the model adds to it; an empty prompt starts a new document.

    Raises:
        InputError: a negative temperature or number of tokens, or a top_k below 1.
    """
    if num_tokens < 0 or not 0 <= temperature < math.inf or (top_k is not None and top_k < 1):
        raise InputError(
            "sampling needs num_tokens >= 0, temperature >= 0 and top_k >= 1, "
            f"got {num_tokens}, {temperature} and {top_k}"
        )
    tokenizer = task.data.tokenizer
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    prompt_T = torch.tensor(ids, device=device)
    out = generate(model, prompt_T, num_tokens, temperature=temperature, top_k=top_k, seed=seed)
    return tokenizer.decode(out.tolist())
