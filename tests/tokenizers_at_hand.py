"""GPT-2's tokenizer where this machine has it: in tiktoken's cache, which a test must not fill from a network."""

import hashlib
import os
from pathlib import Path

import pytest

_URLS = [
    f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}" for name in ("vocab.bpe", "encoder.json")
]
_PLACES = [Path(__file__).parents[1] / ".." / "shared" / "data" / "tokenizer"]
if given := os.environ.get("TIKTOKEN_CACHE_DIR"):
    _PLACES.insert(0, Path(given))


def gpt2_cache() -> Path | None:
    """A folder to set TIKTOKEN_CACHE_DIR to, or None."""
    names = [hashlib.sha1(url.encode()).hexdigest() for url in _URLS]  # as tiktoken calls its files
    return next((place.resolve() for place in _PLACES if all((place / name).is_file() for name in names)), None)


CACHE = gpt2_cache()
if CACHE is not None:
    os.environ["TIKTOKEN_CACHE_DIR"] = str(CACHE)
needs_gpt2 = pytest.mark.skipif(CACHE is None, reason="no copy of GPT-2's tokenizer; set TIKTOKEN_CACHE_DIR to one")
