"""Questions made from held-out books: the last word of a passage, and which of four sentences continues it.

Both are harmless to make in any number, need no annotation, and tell models apart long before the tasks of the field
do. The passages are paragraphs of prose; a question is the same for the same books, whatever is asked of the model.
"""

import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mars_lab.errors import InputError
from mars_lab.evaluation.suite import Row
from mars_lab.prepare.files import JsonLines, find_files

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_LAST_WORD = re.compile(r"(?s)(.*\S)\s+([A-Za-z]{4,})[.!?]")
_CONTEXT_WORDS = 50
_MAX_CONTEXT_WORDS = 150
_ENDING_WORDS = (6, 40)
_NUM_CHOICES = 4


def held_out_books(path: Path) -> Iterator[str]:
    """The texts of a file of JSON lines, or of those of a folder whose names don't begin with `train`.

    Raises:
        InputError: there is none.
    """
    files = [file for file in find_files(path, (".jsonl",)) if path.is_file() or not file.name.startswith("train")]
    if not files:
        raise InputError(f"all files of {path} begin with train, and a model has seen those; give held-out books")
    return (piece.text for piece in JsonLines("books", files, every=2).pieces(None))


def last_words(books: Iterable[str], num_questions: int) -> list[Row]:
    """Passages of at least 50 words whose last word, of four letters or more, has occurred in them before.

    As in LAMBADA (Paperno et al. 2016), the word is found by who has read the passage, not the last sentence alone.
    """
    found = [row for book in books for paragraph in _paragraphs(book) if (row := _last_word(paragraph)) is not None]
    return _drawn(found, num_questions, "last-word")


def continuations(books: Iterable[str], num_questions: int) -> list[Row]:
    """Passages of at least 50 words, the sentence that follows, and three that follow others in the same book."""
    rng = random.Random(0)
    found: list[Row] = []
    for book in books:
        pairs = [pair for paragraph in _paragraphs(book) if (pair := _continued(paragraph)) is not None]
        if len(pairs) < _NUM_CHOICES:
            continue
        for index, (context, ending) in enumerate(pairs):
            others = rng.sample([i for i in range(len(pairs)) if i != index], _NUM_CHOICES - 1)
            choices = [pairs[other][1] for other in others]
            label = rng.randrange(_NUM_CHOICES)
            choices.insert(label, ending)
            found.append({"context": context, "choices": choices, "label": label})
    return _drawn(found, num_questions, "continuation")


def _paragraphs(book: str) -> Iterator[list[str]]:
    """Paragraphs as sentences."""
    for paragraph in re.split(r"\n\s*\n", book):
        yield _SENTENCE_END.split(" ".join(paragraph.split()))


def _opening(sentences: list[str]) -> int:
    """How many sentences it takes to have enough words; 0 if there are too few or too many."""
    num_words = 0
    for count, sentence in enumerate(sentences, start=1):
        num_words += len(sentence.split())
        if num_words >= _CONTEXT_WORDS:
            return count if num_words <= _MAX_CONTEXT_WORDS else 0
    return 0


def _last_word(sentences: list[str]) -> Row | None:
    first = _opening(sentences)
    for count in range(first, len(sentences) + 1) if first else ():
        match = _LAST_WORD.fullmatch(" ".join(sentences[:count]))
        if match is None:
            continue
        context, word = match.groups()
        if len(context.split()) <= _MAX_CONTEXT_WORDS and re.search(rf"\b{word}\b", context):
            return {"context": context, "word": word}
    return None


def _continued(sentences: list[str]) -> tuple[str, str] | None:
    count = _opening(sentences)
    if not count or count == len(sentences):
        return None
    shortest, longest = _ENDING_WORDS
    ending = sentences[count]
    return (" ".join(sentences[:count]), ending) if shortest <= len(ending.split()) <= longest else None


def _drawn(found: list[Row], num_questions: int, what: str) -> list[Row]:
    if not found:
        raise InputError(f"the books hold no passage for a {what} question: paragraphs of 50 words or more are needed")
    return found if len(found) <= num_questions else random.Random(0).sample(found, num_questions)
