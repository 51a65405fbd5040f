"""Between text and tokens: the tokenizer of a token folder, whoever made it."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import tokenizers

from mars_lab.data.gpt2_bpe import from_tiktoken
from mars_lab.errors import InputError

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257


class Tokenizer(Protocol):
    """What sampling and exporting need of a tokenizer."""

    @property
    def end_of_text(self) -> int:
        """The token that separates documents."""
        ...

    def encode(self, text: str) -> list[int]:
        """`text` as tokens; nothing in it is taken for a special token."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`, special ones included."""
        ...

    def as_hugging_face(self) -> tokenizers.Tokenizer:
        """The same for the library `tokenizers`."""
        ...


class TrainedTokenizer:
    """A tokenizer in the format of Hugging Face's `tokenizers`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, end_of_text: int) -> None:
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.end_of_text = end_of_text

    @classmethod
    def read(cls, path: Path) -> "TrainedTokenizer":
        """The tokenizer in the file `tokenizer.json`.

        Raises:
            InputError: it isn't one, or has no end-of-text token.
        """
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises bare exceptions.
            raise InputError(f"{path} is not a tokenizer of the library `tokenizers` ({error}); restore it") from None
        tokenizer.encode_special_tokens = True  # as the text that it is
        if (end_of_text := tokenizer.token_to_id(END_OF_TEXT)) is None:
            raise InputError(f"the tokenizer {path} has no token {END_OF_TEXT}, which separates documents; add it")
        return cls(tokenizer, end_of_text)

    def encode(self, text: str) -> list[int]:
        """`text` as tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`, special ones included."""
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def as_hugging_face(self) -> tokenizers.Tokenizer:
        """What it is."""
        return self._tokenizer


class GPT2Tokenizer:
    """GPT-2's byte-level BPE, by tiktoken."""

    def __init__(self) -> None:
        self._encoding = gpt2_encoding()
        self.end_of_text: int = self._encoding.eot_token

    def encode(self, text: str) -> list[int]:
        """`text` as tokens."""
        return self._encoding.encode_ordinary(text)

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`; those that only pad the vocabulary have none."""
        return self._encoding.decode([token for token in tokens if token < GPT2_VOCAB_SIZE])

    def as_hugging_face(self) -> tokenizers.Tokenizer:
        """The same vocabulary and merges."""
        return from_tiktoken(self._encoding)


@lru_cache(maxsize=1)
def gpt2_encoding() -> "tiktoken.Encoding":
    """tiktoken's `gpt2`, downloaded on first use and kept in tiktoken's cache.

    Raises:
        InputError: tiktoken isn't installed, or has neither a cached copy nor a network.
    """
    try:
        import tiktoken
    except ModuleNotFoundError:
        raise InputError("GPT-2's tokenizer needs the package tiktoken: pip install tiktoken") from None
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # Whatever the network, a proxy or the disk has to say.
        raise InputError(
            f"GPT-2's tokenizer can't be downloaded ({type(error).__name__}); run `python -c 'import tiktoken; "
            'tiktoken.get_encoding("gpt2")\'` with TIKTOKEN_CACHE_DIR set to a folder where there is a network, '
            "and set TIKTOKEN_CACHE_DIR to a copy of that folder here"
        ) from None
