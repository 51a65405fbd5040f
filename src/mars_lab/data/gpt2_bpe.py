"""GPT-2's tokenizer, from tiktoken's table of ranks to the form that Hugging Face's `tokenizers` reads."""

from functools import lru_cache
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

if TYPE_CHECKING:
    import tiktoken


@lru_cache(maxsize=1)
def from_tiktoken(encoding: "tiktoken.Encoding") -> tokenizers.Tokenizer:
    """The same tokenizer: the same tokens for every text.

    tiktoken keeps the tokens alone; which two are merged into a third follows from them: those that the merges of
    lower rank leave of it.
    """
    ranks = {encoding.decode_single_token_bytes(token): token for token in range(encoding.eot_token)}
    spelling = _spelling()
    spelled = {token: "".join(spelling[byte] for byte in token) for token in ranks}
    pairs = (_parents(token, ranks) for token in ranks if len(token) > 1)
    merges = [(spelled[left], spelled[right]) for left, right in pairs]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([encoding.decode([encoding.eot_token])])
    return tokenizer


def _parents(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The last two parts of `token` when merges are done in order of rank."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(parts[i] + parts[i + 1], len(ranks)) for i in range(len(parts) - 1)]
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _spelling() -> dict[int, str]:
    """A visible character for each byte, as GPT-2 has them: itself, or, where it is blank, one from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    blank = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(blank)}
