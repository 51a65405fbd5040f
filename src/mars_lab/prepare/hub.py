"""Corpora on the Hugging Face Hub, streamed: nothing but what is being read is on this machine."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mars_lab.errors import InputError
from mars_lab.prepare.source import Part, Piece


@dataclass(frozen=True)
class Corpus:
    """Where a corpus is, and what has to be said about it."""

    name: str
    repository: str
    licence: str
    validation: str
    subset: str | None = None
    num_documents: int | None = None
    val_documents: Callable[[], frozenset[int]] | None = None
    """Numbers of the documents held out; None: the first file of tokens is."""


def _nanogpts_val_documents(num_documents: int = 8_013_769) -> frozenset[int]:
    """Those that `train_test_split(test_size=0.0005, seed=2357)` of `datasets` draws, as nanoGPT does."""
    permutation = np.random.default_rng(2357).permutation(num_documents)
    return frozenset(permutation[: math.ceil(0.0005 * num_documents)].tolist())


OPENWEBTEXT = Corpus(
    "openwebtext",
    "Skylion007/openwebtext",
    "CC0-1.0 for the packaging; the texts are their authors'",
    "nanoGPT's 4,007 documents (train_test_split, test_size 0.0005, seed 2357)",
    num_documents=8_013_769,
    val_documents=_nanogpts_val_documents,
)
FINEWEB_EDU = Corpus(
    "fineweb-edu",
    "HuggingFaceFW/fineweb-edu",
    "ODC-By-1.0, and the terms of use of Common Crawl",
    "the first file of tokens, as for FineWeb in modded-nanogpt",
    subset="sample-100BT",
)


@dataclass
class HubSource:
    """A corpus as `datasets` streams it.

    Raises:
        InputError: `datasets` is missing, the Hub can't be reached, or it holds another number of documents.
    """

    corpus: Corpus
    revision: str | None = None
    """A commit of the repository; None asks the Hub for the newest."""
    _documents: int = 0
    _dataset: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.revision = self.revision or _connected(lambda: _newest_revision(self.corpus.repository))
        self._dataset = _connected(self._open)

    @property
    def name(self) -> str:
        """The corpus's."""
        return self.corpus.name

    @property
    def about(self) -> dict[str, Any]:
        """Repository, subset, revision, licence and split."""
        names = ("repository", "subset", "licence", "validation")
        return {name: getattr(self.corpus, name) for name in names} | {"revision": self.revision}

    def pieces(self, position: dict[str, Any] | None) -> Iterator[Piece]:
        """A document each."""
        if position is not None:
            self._documents = position["documents"]
            self._dataset.load_state_dict(position["dataset"])
        val_documents = None if self.corpus.val_documents is None else self.corpus.val_documents()
        rows = iter(self._dataset)
        while (row := _connected(lambda: next(rows, None))) is not None:
            part: Part | None = None
            if val_documents is not None:
                part = "val" if self._documents in val_documents else "train"
            self._documents += 1
            yield Piece(row["text"], part)
        expected = self.corpus.num_documents
        if expected is not None and self._documents != expected:
            raise InputError(
                f"{self.corpus.repository} at {self.revision} has {self._documents:,} documents, not {expected:,}: it "
                "is not the corpus that the split is defined for; give an earlier --revision"
            )

    def position(self) -> dict[str, Any]:
        """The state of the stream."""
        return {"documents": self._documents, "dataset": self._dataset.state_dict()}

    def progress(self) -> tuple[float, float | None]:
        """Documents."""
        return self._documents, self.corpus.num_documents

    def _open(self) -> Any:
        import datasets

        arguments = {"split": "train", "streaming": True, "revision": self.revision}
        return datasets.load_dataset(self.corpus.repository, self.corpus.subset, **arguments).select_columns("text")


def _newest_revision(repository: str) -> str | None:
    import datasets  # noqa: F401 - so that a missing package is noticed before the network
    from huggingface_hub import HfApi

    return HfApi().dataset_info(repository, timeout=20).sha


def _connected(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except ModuleNotFoundError as error:
        raise InputError(
            f"corpora on the Hugging Face Hub need the package {error.name}: pip install 'mars-optim[hub]'"
        ) from None
    except InputError:
        raise
    except Exception as error:  # Networks, proxies, tokens and servers fail in their own ways each.
        raise InputError(
            f"the Hugging Face Hub can't be read ({type(error).__name__}: {str(error)[:200]}); check the network and, "
            "if access is restricted, `hf auth login`. Without a network use files: mars prepare jsonl PATH. What was "
            "prepared is kept, and the same command continues"
        ) from None
