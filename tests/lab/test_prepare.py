"""`mars prepare`: the tokens are those of the text, whatever its size and however often it was stopped."""

import bz2
import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import json
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mars_lab.cli import main
from mars_lab.data import tokens
from mars_lab.data.tokens import DataConfig
from mars_lab.errors import InputError
from mars_lab.prepare import command, files, hub, preparation
from mars_lab.prepare.command import PrepareCommand
from mars_lab.prepare.files import JsonLines, PlainText
from mars_lab.prepare.hub import FINEWEB_EDU, OPENWEBTEXT, HubSource
from mars_lab.prepare.preparation import PrepareConfig, prepare
from mars_lab.prepare.source import Piece, Source

from .tiny_runs import prose

PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
MERGES = [b" t", b"th", b"the", b" the", b"  ", b"\n\n", b" a", b"an", b" s", b"  " * 2, b"ta", b"\xc3\xbc"]


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    """GPT-2's splitting into words, with few merges and no need of a network."""
    ranks = {bytes([i]): i for i in range(256)} | {merge: 256 + i for i, merge in enumerate(MERGES)}
    return tiktoken.Encoding("tiny", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 268})


def expected(encoding: tiktoken.Encoding, documents: list[str]) -> np.ndarray:
    return np.array([t for d in documents for t in (*encoding.encode_ordinary(d), 268)], dtype=np.uint16)


def part(folder: Path, name: str) -> np.ndarray:
    """The tokens of one part, read as modded-nanogpt does."""
    found = []
    for path in sorted(folder.glob(f"*_{name}_*.bin")):
        header = np.fromfile(path, dtype=np.int32, count=256)
        assert header[:2].tolist() == [20240520, 1]
        found.append(np.fromfile(path, dtype=np.uint16, offset=1024))
        assert header[2] == len(found[-1])
    return np.concatenate(found)


DOCUMENTS = [f"Grüße {i}: {prose(20 + i, i)}<|endoftext|> is no token here" for i in range(120)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in DOCUMENTS))
    return path


def test_the_files_hold_the_documents(tmp_path: Path, corpus: Path, encoding: tiktoken.Encoding) -> None:
    folder = tmp_path / "out"
    manifest = prepare(JsonLines("jsonl", [corpus], every=50), encoding, folder, PrepareConfig(shard_tokens=5000))
    held_out = [DOCUMENTS[25], DOCUMENTS[75]]
    assert np.array_equal(part(folder, "val"), expected(encoding, held_out))
    train = expected(encoding, [d for d in DOCUMENTS if d not in held_out])
    assert np.array_equal(part(folder, "train"), train)
    sizes = [manifest["tokens"][f"jsonl_train_{n:06}.bin"] for n in range(len(train) // 5000 + 1)]
    assert sizes == [5000] * (len(train) // 5000) + [len(train) % 5000]
    assert manifest["documents"] == {"train": 118, "val": 2}
    assert manifest["text_bytes"] == sum(len(d.encode()) for d in DOCUMENTS)
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert {p.name for p in folder.iterdir()} == {*manifest["tokens"], "manifest.json", ".lock"}
    data = tokens.open_files(sorted(folder.glob("*.bin")))
    assert np.array_equal(data.train[:], train)


@pytest.mark.parametrize(("suffix", "pack"), [(".xz", lzma.open), (".gz", gzip.open), (".bz2", bz2.open)])
def test_packed_files_are_read(
    tmp_path: Path, corpus: Path, encoding: tiktoken.Encoding, suffix: str, pack: Any
) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    for name in ("train-0", "train-1", "val", "test"):
        with pack(folder / f"{name}.jsonl{suffix}", "wb") as stream:
            stream.write(corpus.read_bytes())
    source = command._local_source(PrepareCommand("books", folder), folder)
    prepare(source, encoding, tmp_path / "out", PrepareConfig())
    assert np.array_equal(part(tmp_path / "out", "train"), expected(encoding, DOCUMENTS * 2))
    assert np.array_equal(part(tmp_path / "out", "val"), expected(encoding, DOCUMENTS))


@given(
    text=st.text(alphabet=st.sampled_from("the atü—. \n\t2'sé\u3000"), min_size=40, max_size=400),
    piece_bytes=st.integers(24, 60),
    val_fraction=st.floats(0.05, 0.5),
)
@example(text="222222222222éé—\u3000ta22222222222222222222——", piece_bytes=24, val_fraction=0.5)
@example(text="22222222222 2222—\u3000 22é——ta22222222222222", piece_bytes=24, val_fraction=0.25)
@settings(deadline=None, max_examples=150)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(
    text: str, piece_bytes: int, val_fraction: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ranks = {bytes([i]): i for i in range(256)} | {merge: 256 + i for i, merge in enumerate(MERGES)}
    tiny = tiktoken.Encoding("tiny", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 268})
    path = tmp_path_factory.mktemp("text") / "one.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_PIECE_BYTES", piece_bytes)
        pieces = list(PlainText("text", [path], val_fraction).pieces(None))
    parts = {name: [piece.text for piece in pieces if piece.part == name] for name in ("train", "val")}
    assert "".join(parts["train"]) + "".join(parts["val"]) == text
    for name, texts in parts.items():
        whole = "".join(texts)
        if any(len(uncut.encode()) >= piece_bytes - 4 for uncut in re.split(r"(?<=\S)(?=[ \n\r\t])", whole)):
            continue  # no place to cut in it: only before white space of one byte that follows something else
        ids = [token for piece in texts for token in tiny.encode_ordinary(piece)]
        assert ids == tiny.encode_ordinary(whole), name
    assert len("".join(parts["val"]).encode()) <= val_fraction * len(text.encode()) + 1
    assert [piece.ends_document for piece in pieces].count(True) == len([p for p in parts.values() if p])


@pytest.mark.parametrize("word", ["word ", "слово ", "字"])
def test_the_end_of_a_text_is_held_out(tmp_path: Path, word: str) -> None:
    (tmp_path / "one.txt").write_text(word * 1000, encoding="utf-8")
    pieces = list(PlainText("text", [tmp_path / "one.txt"], 0.1).pieces(None))
    assert [piece.part for piece in pieces] == ["train", "val"]
    assert pieces[0].text + pieces[1].text == word * 1000
    assert len(pieces[1].text) == pytest.approx(100 * len(word), abs=len(word))
    assert pieces[1].text.startswith(" ") == word.endswith(" ")


def test_a_folder_of_texts_holds_out_whole_files(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:02}.txt").write_text(f"text {number}")
    pieces = list(PlainText("text", files.find_files(tmp_path, (".txt",)), 0.25).pieces(None))
    assert [piece.text for piece in pieces if piece.part == "val"] == ["text 2", "text 6", "text 10"]


class PowerCutError(Exception):
    """Stands for the process's sudden end."""


@dataclasses.dataclass
class Fragile:
    """A source that fails after so many pieces."""

    source: JsonLines
    left: int
    name: str = "jsonl"

    @property
    def about(self) -> dict[str, Any]:
        return self.source.about

    def pieces(self, position: dict[str, Any] | None) -> Iterator[Piece]:
        for piece in self.source.pieces(position):
            self.left -= 1
            if self.left < 0:
                raise PowerCutError
            yield piece

    def position(self) -> dict[str, Any]:
        return self.source.position()

    def progress(self) -> tuple[float, float | None]:
        return self.source.progress()


@pytest.mark.parametrize("shard_tokens", [700, 5000, 10**6])
@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_stopped_anywhere_and_continued_it_is_the_same(
    tmp_path: Path,
    corpus: Path,
    encoding: tiktoken.Encoding,
    monkeypatch: pytest.MonkeyPatch,
    shard_tokens: int,
    seconds: float,
) -> None:
    monkeypatch.setattr(preparation, "_BATCH_CHARACTERS", 500)
    monkeypatch.setattr(preparation, "_SECONDS_BETWEEN_RECORDS", seconds)
    config = PrepareConfig(shard_tokens=shard_tokens, num_workers=2)
    straight = prepare(JsonLines("jsonl", [corpus], every=10), encoding, tmp_path / "straight", config)
    manifest = None
    for stops in itertools.count():
        source = Fragile(JsonLines("jsonl", [corpus], every=10), 23 + 7 * stops)  # more each time: also without records
        try:
            manifest = prepare(source, encoding, tmp_path / "stopped", config)
            break
        except PowerCutError:
            continue
    assert stops > 0
    assert manifest == straight
    for name in straight["tokens"]:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert not list((tmp_path / "stopped").glob("*.partial"))


def test_a_file_finished_after_the_last_record_is_taken_back(
    tmp_path: Path, corpus: Path, encoding: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends between giving a full file its name and writing it down, several times."""
    monkeypatch.setattr(preparation, "_BATCH_CHARACTERS", 500)
    config = PrepareConfig(shard_tokens=900, num_workers=1)
    straight = prepare(JsonLines("jsonl", [corpus], every=10), encoding, tmp_path / "straight", config)
    record = preparation._Preparation._record
    calls = 0

    def failing(self: Any, writers: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 3 == 2:
            raise PowerCutError
        record(self, writers)

    monkeypatch.setattr(preparation._Preparation, "_record", failing)
    manifest = None
    while manifest is None:
        with contextlib.suppress(PowerCutError):
            manifest = prepare(JsonLines("jsonl", [corpus], every=10), encoding, tmp_path / "stopped", config)
    assert calls > 10
    assert manifest == straight
    assert np.array_equal(part(tmp_path / "stopped", "train"), part(tmp_path / "straight", "train"))


KILLED = """
import sys, tiktoken
from pathlib import Path
from mars_lab.prepare import preparation
from mars_lab.prepare.files import JsonLines
preparation._BATCH_CHARACTERS, preparation._SECONDS_BETWEEN_RECORDS = 2000, 0.02
ranks = {bytes([i]): i for i in range(256)}
special = {"<|endoftext|>": 256}
encoding = tiktoken.Encoding("bytes", pat_str=r"\\S+|\\s+", mergeable_ranks=ranks, special_tokens=special)
source = JsonLines("jsonl", [Path(sys.argv[1])], every=10)
preparation.prepare(source, encoding, Path(sys.argv[2]), preparation.PrepareConfig(shard_tokens=100_000, num_workers=2))
"""


def test_killed_at_random_moments_it_ends_with_the_same_files(tmp_path: Path) -> None:
    corpus = tmp_path / "documents.jsonl"
    corpus.write_text("".join(json.dumps({"text": prose(100, i)}) + "\n" for i in range(6000)))
    arguments = [sys.executable, "-c", KILLED, str(corpus)]
    subprocess.run([*arguments, str(tmp_path / "straight")], check=True, timeout=120, capture_output=True)
    folder, chance, kills = tmp_path / "killed", random.Random(time.time_ns()), 0
    for _ in range(4):
        process = subprocess.Popen([*arguments, str(folder)], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not list(folder.glob("*.partial")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait(timeout=60)
    subprocess.run([*arguments, str(folder)], check=True, timeout=120, capture_output=True)
    assert kills
    names = sorted(path.name for path in (tmp_path / "straight").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


def test_a_finished_one_is_not_repeated_and_other_settings_are_refused(
    tmp_path: Path, corpus: Path, encoding: tiktoken.Encoding
) -> None:
    folder = tmp_path / "out"
    first = prepare(JsonLines("jsonl", [corpus], every=50), encoding, folder, PrepareConfig())
    written = (folder / "manifest.json").stat().st_mtime_ns
    assert prepare(JsonLines("jsonl", [corpus], every=50), encoding, folder, PrepareConfig()) == first
    assert (folder / "manifest.json").stat().st_mtime_ns == written
    with pytest.raises(InputError, match=r"begun with another shard_tokens \(100000000, now 7\); choose another"):
        prepare(JsonLines("jsonl", [corpus], every=50), encoding, folder, PrepareConfig(shard_tokens=7))
    with pytest.raises(InputError, match=r"begun with another about .*1 document in 50.*1 document in 51"):
        prepare(JsonLines("jsonl", [corpus], every=51), encoding, folder, PrepareConfig())
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"holds jsonl_.*bin and no manifest.json; choose another --output"):
        prepare(JsonLines("jsonl", [corpus], every=50), encoding, folder, PrepareConfig())


def test_two_processes_do_not_write_one_folder(tmp_path: Path, corpus: Path, encoding: tiktoken.Encoding) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with preparation._locked(folder), pytest.raises(InputError, match="another process is preparing"):
        prepare(JsonLines("jsonl", [corpus], every=50), encoding, folder, PrepareConfig())


def test_an_end_after_so_many_tokens(tmp_path: Path, corpus: Path, encoding: tiktoken.Encoding) -> None:
    source = JsonLines("jsonl", [corpus], every=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "_BATCH_CHARACTERS", 300)
        manifest = prepare(source, encoding, tmp_path / "out", PrepareConfig(max_tokens=2000))
    assert 2000 <= sum(manifest["tokens"].values()) < 2700


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"d.jsonl, line at byte 14: not valid JSON"),
        (b'{"text": "\xe9"}\n', r"d.jsonl, line at byte 0: not UTF-8; convert"),
        (b"[1]\n", r'd.jsonl, line at byte 0: needs an object with a string "text"'),
        (b'{"text": "\\ud83d"}\n', r"d.jsonl, line at byte 0: the text has half of a surrogate pair"),
        (b'{"text": "a"}\n', r"no text for the part 'val': all 1 documents went to the other"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, encoding: tiktoken.Encoding, content: bytes, message: str) -> None:
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        prepare(JsonLines("jsonl", [tmp_path / "d.jsonl"], every=50), encoding, tmp_path / "out", PrepareConfig())


def test_bad_text_and_damaged_archives_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait " * 3)
    with pytest.raises(InputError, match=r"latin.txt, byte 3: 0xe9 is not UTF-8; convert the file first"):
        list(PlainText("text", [tmp_path / "latin.txt"], 0.5).pieces(None))
    packed = tmp_path / "a.jsonl.xz"
    packed.write_bytes(lzma.compress(b'{"text": "a"}\n' * 10000)[:-30])
    with pytest.raises(InputError, match=r"a.jsonl.xz can't be unpacked .*restore it"):
        list(JsonLines("jsonl", [packed], every=2).pieces(None))
    with pytest.raises(InputError, match=r"a.jsonl.xz is packed; unpack it first"):
        PlainText("text", [packed], 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("text",), "text needs the path of what to prepare: mars prepare text PATH"),
        (("jsonl", "nowhere"), "there is nothing at nowhere"),
        (("openwebtext", "here"), "openwebtext is streamed and takes no path, got here"),
        (("openwebtext", "--subset", "x"), "openwebtext has no subsets, got --subset x"),
        (("text", ".", "--val-fraction", "0.9"), r"--val-fraction must be in (0, 0.5], got 0.9"),
        (("text", ".", "--shard-tokens", "0"), r"--shard-tokens must be in [1, 2**31)"),
    ],
)
def test_mistakes_on_the_command_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    encoding: tiktoken.Encoding,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "gpt2_encoding", lambda: encoding)
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_ends_with_what_to_do_next(
    tmp_path: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    encoding: tiktoken.Encoding,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "gpt2_encoding", lambda: encoding)
    main(["prepare", "jsonl", str(corpus), "--val-fraction", "0.1"])
    assert "Next: mars train --data.tokens data/documents" in capsys.readouterr().out
    assert len(tokens.load(DataConfig(tokens="data/documents")).train) > 1000


def test_few_tokens_of_books_have_both_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: tiktoken.Encoding
) -> None:
    monkeypatch.setattr(command, "gpt2_encoding", lambda: encoding)
    monkeypatch.setattr(preparation, "_BATCH_CHARACTERS", 300)
    for name, documents in (("train-0", DOCUMENTS[:60]), ("val", DOCUMENTS[60:70]), ("test", DOCUMENTS[70:])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    num_held_out = len(expected(encoding, DOCUMENTS[60:70]))
    folder = tmp_path / "out"
    main(["prepare", "books", str(tmp_path), "--output", str(folder), "--max-tokens", str(num_held_out + 500)])
    assert np.array_equal(part(folder, "val"), expected(encoding, DOCUMENTS[60:70]))
    train = part(folder, "train")
    assert 500 <= len(train) < 1500
    assert np.array_equal(train, expected(encoding, DOCUMENTS[:60])[: len(train)])


@pytest.fixture
def streamed(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` as it is, the Hub's place taken by a local file."""
    import datasets

    load = datasets.load_dataset

    def local(path: str, name: str | None, *, split: str, streaming: bool, revision: str) -> Any:
        assert (split, streaming, revision) == ("train", True, "abc")
        return load("json", data_files=str(corpus), split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr(hub, "_newest_revision", lambda repository: "abc")


def small_openwebtext() -> Source:
    held_out = frozenset({3, 50, 119})
    return HubSource(dataclasses.replace(OPENWEBTEXT, num_documents=120, val_documents=lambda: held_out))


@pytest.mark.usefixtures("streamed")
def test_a_streamed_corpus_is_continued_where_it_was_stopped(
    tmp_path: Path, encoding: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "_BATCH_CHARACTERS", 500)
    monkeypatch.setattr(preparation, "_SECONDS_BETWEEN_RECORDS", 0.0)
    config = PrepareConfig(num_workers=1)
    with pytest.raises(PowerCutError):
        prepare(Fragile(small_openwebtext(), 70, "openwebtext"), encoding, tmp_path / "out", config)  # pyright: ignore[reportArgumentType]
    position = json.loads((tmp_path / "out" / "manifest.json").read_text())["position"]
    assert 0 < position["documents"] <= 70
    manifest = prepare(small_openwebtext(), encoding, tmp_path / "out", config)
    held_out = [DOCUMENTS[3], DOCUMENTS[50], DOCUMENTS[119]]
    assert np.array_equal(part(tmp_path / "out", "val"), expected(encoding, held_out))
    train = expected(encoding, [d for d in DOCUMENTS if d not in held_out])
    assert np.array_equal(part(tmp_path / "out", "train"), train)
    assert manifest["about"]["revision"] == "abc"
    assert manifest["about"]["licence"].startswith("CC0-1.0")


@pytest.mark.usefixtures("streamed")
def test_fineweb_holds_out_its_first_file(tmp_path: Path, encoding: tiktoken.Encoding) -> None:
    prepare(HubSource(FINEWEB_EDU), encoding, tmp_path / "out", PrepareConfig(shard_tokens=3000))
    everything = expected(encoding, DOCUMENTS)
    assert np.array_equal(part(tmp_path / "out", "val"), everything[:3000])
    assert np.array_equal(part(tmp_path / "out", "train"), everything[3000:])


@pytest.mark.usefixtures("streamed")
def test_another_corpus_than_the_split_is_for_is_refused(tmp_path: Path, encoding: tiktoken.Encoding) -> None:
    with pytest.raises(InputError, match=r"at abc has 120 documents, not 8,013,769: it is not the corpus"):
        prepare(HubSource(OPENWEBTEXT), encoding, tmp_path / "out", PrepareConfig())


def test_the_documents_held_out_are_nanogpts() -> None:
    """nanoGPT: `train_test_split(test_size=0.0005, seed=2357, shuffle=True)`; its comments count 4,007 documents."""
    import datasets

    numbers = datasets.Dataset.from_dict({"number": range(20_001)})
    theirs = numbers.train_test_split(test_size=0.0005, seed=2357, shuffle=True)["test"]["number"]
    assert hub._nanogpts_val_documents(20_001) == frozenset(theirs)
    assert len(hub._nanogpts_val_documents()) == 4007


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("no route"),
            r"the Hugging Face Hub can't be read \(ConnectionError: no route\); check the net",
        ),
        (ModuleNotFoundError(name="datasets"), r"need the package datasets: pip install 'mars-optim\[hub\]'"),
    ],
)
def test_without_network_or_package_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(repository: str) -> Any:
        raise error

    monkeypatch.setattr(hub, "_newest_revision", fail)
    with pytest.raises(InputError, match=message):
        HubSource(OPENWEBTEXT)


def test_with_gpt2s_tokenizer(tmp_path: Path, corpus: Path) -> None:
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:
        pytest.skip(f"GPT-2's tokenizer is neither cached nor to be had: {type(error).__name__}")
    prepare(JsonLines("jsonl", [corpus], every=50), gpt2, tmp_path / "out", PrepareConfig())
    held_out = [DOCUMENTS[25], DOCUMENTS[75]]
    assert part(tmp_path / "out", "val").tolist() == [t for d in held_out for t in (*gpt2.encode_ordinary(d), 50256)]
