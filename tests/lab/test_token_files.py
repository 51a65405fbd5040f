"""Token files: both formats, many of them as one stream, and everything that can be wrong with them."""

import dataclasses
import hashlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mars_lab.data import tokens
from mars_lab.data.token_files import TokenFile, TokenFiles
from mars_lab.data.tokens import DataConfig
from mars_lab.errors import InputError
from mars_lab.tasks.language import LanguageTask
from mars_lab.training import launch
from mars_lab.training.config import RunConfig
from mars_lab.training.loop import train

from .tiny_runs import assert_identical, outcome

TEXT = np.random.default_rng(0).integers(0, 300, 5000, dtype=np.uint16)


def write(path: Path, values: np.ndarray, *, magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    """As modded-nanogpt's `data/fineweb.py` does: 256 int32 of header, then the tokens."""
    count = len(values) if count is None else count
    path.write_bytes(struct.pack("<3i", magic, version, count) + bytes(1012) + values.astype("<u2").tobytes())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The text in five files of training and one of validation, one of them nanoGPT's and one empty."""
    path = tmp_path / "tokens"
    path.mkdir()
    cuts = [0, 1700, 1703, 1703, 3000, 4000]
    for number, (begin, end) in enumerate(pairwise(cuts)):
        write(path / f"text_train_{number:06}.bin", TEXT[begin:end])
    (path / "text_train_000003.bin").write_bytes(TEXT[1703:3000].astype("<u2").tobytes())
    write(path / "text_val_000000.bin", TEXT[4000:])
    return path


def test_files_of_both_formats_are_one_stream(folder: Path) -> None:
    data = tokens.load(DataConfig(tokens=str(folder)))
    assert len(data.train) == 4000
    assert data.vocab_size == 50257
    for start, stop in ((0, 4000), (1690, 1710), (1699, 1704), (2999, 3001), (3999, 4000), (5, 5)):
        assert np.array_equal(data.train[start:stop], TEXT[start:stop]), (start, stop)
    assert np.array_equal(data.val[:], TEXT[4000:])


def test_a_pattern_chooses_files(folder: Path) -> None:
    pattern = str(folder / "text_*_00000[0-2].bin")
    assert len(tokens.load(DataConfig(tokens=pattern)).train) == 1703


def test_more_files_than_may_be_open_at_once(tmp_path: Path) -> None:
    files = [TokenFile.inspect(write(tmp_path / f"{n:03}.bin", TEXT[n : n + 1])) for n in range(200)]
    stream = TokenFiles(files, 300)
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    assert np.array_equal(stream[0:200], TEXT[:200])
    assert len(list(Path("/proc/self/fd").iterdir())) - open_before <= 64
    assert np.array_equal(stream[0:200], TEXT[:200])


def test_threads_read_side_by_side(tmp_path: Path) -> None:
    files = [TokenFile.inspect(write(tmp_path / f"{n:03}.bin", TEXT[n : n + 1])) for n in range(100)]
    for _ in range(5):
        stream = TokenFiles(files, 300)
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda n, stream=stream: int(stream[n % 100 : n % 100 + 1][0]), range(1000)))
        assert read == [int(TEXT[n % 100]) for n in range(1000)]


def test_training_on_token_files_is_training_on_the_text_they_came_from(tmp_path: Path, tiny: RunConfig) -> None:
    """The same tokens as one file of nanoGPT's format and as several with headers: the same run, bit for bit."""
    text = tokens.load(tiny.language.data)
    folder = tmp_path / "tokens"
    folder.mkdir()
    train_tokens = text.train[:]
    for number, part in enumerate(np.array_split(train_tokens, 7)):
        write(folder / f"x_train_{number}.bin", part)
    write(folder / "x_val_0.bin", text.val[:])
    assert text.tokenizer_path is not None
    (folder / "tokenizer.json").write_bytes(text.tokenizer_path.read_bytes())
    data = dataclasses.replace(tiny.language.data, tokens=str(folder))
    outcomes = []
    for name, config in (
        ("text", tiny),
        ("files", dataclasses.replace(tiny, task=dataclasses.replace(tiny.language, data=data))),
    ):
        task, run = launch.start(config, tmp_path, name, numbered=False)
        train(task, config, run, quiet=True)
        state, rows = outcome(run.path)
        outcomes.append((state["model"], rows, (run.path / "sample.txt").read_text()))
    assert_identical(outcomes[1], outcomes[0])


def damage(folder: Path, what: str) -> None:
    first = folder / "text_train_000000.bin"
    match what:
        case "truncated":
            first.write_bytes(first.read_bytes()[:-2])
        case "odd":
            (folder / "text_train_000003.bin").write_bytes(b"123")
        case "magic":
            write(first, TEXT[:1700], magic=20240521)
        case "version":
            write(first, TEXT[:1700], version=2)
        case "token":
            values = TEXT[:1700].copy()
            values[1234] = 50300
            write(first, values)
        case "name":
            first.rename(folder / "text.bin")
        case "both":
            first.rename(folder / "trainval.bin")
        case "no val":
            (folder / "text_val_000000.bin").unlink()
        case "manifest":
            (folder / "manifest.json").write_text(json.dumps({"tokens": {first.name: 1699}}))
        case "missing":
            (folder / "manifest.json").write_text(json.dumps({"tokens": {"text_train_000009.bin": 5}}))
        case "unfinished":
            (folder / "manifest.json").write_text(json.dumps({"tokens": {}, "complete": False}))
        case "not json":
            (folder / "manifest.json").write_text("{")
        case _:
            (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", r"train_000000.bin should have 4424 bytes according to its header \(1700 tokens\), but has 4422"),
        ("odd", r"train_000003.bin has 3 bytes, an odd number, so it was cut short; restore it"),
        ("magic", r"train_000000.bin has a header with magic number 20240521 and version 1, not 20240520 and 1"),
        ("version", r"train_000000.bin has a header with magic number 20240520 and version 2"),
        ("token", r"train_000000.bin holds 50300 as token 1234, beyond the vocabulary of 50257; .*restore it"),
        ("name", r"text.bin has neither 'train' nor 'val' in its name.*rename it, or give a pattern"),
        ("both", r"trainval.bin has both 'train' and 'val' in its name"),
        ("no val", r"no file with 'val' in its name"),
        ("manifest", r"train_000000.bin has 1700 tokens, but 1699 according to manifest.json; restore it"),
        ("missing", r"text_train_000009.bin is in manifest.json but isn't there; restore it"),
        ("unfinished", r"tokens is not finished; the command that began it continues it"),
        ("not json", r"manifest.json is damaged"),
        ("tokenizer", r"tokenizer.json is not a tokenizer of the library `tokenizers`"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(folder: Path, what: str, message: str) -> None:
    damage(folder, what)
    with pytest.raises(InputError, match=message):
        _ = tokens.load(DataConfig(tokens=str(folder))).train[:]


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no token file at .*: make some with `mars prepare`, or give --data.tokens"):
        tokens.load(DataConfig(tokens=str(tmp_path)))


@pytest.mark.parametrize("cut", [4420, 1100])
def test_a_file_cut_short_while_in_use_is_an_error_not_a_bus_error(folder: Path, cut: int) -> None:
    data = tokens.load(DataConfig(tokens=str(folder)))
    path = folder / "text_train_000000.bin"
    first_seen = cut == 1100
    if first_seen:
        _ = data.train[0:10]  # the file is open from now on
    with path.open("r+b") as stream:
        stream.truncate(cut)
    message = "ends before token 1700 of 1700: it was cut short" if first_seen else "has 4420 bytes and had 4424 when"
    with pytest.raises(InputError, match=rf"text_train_000000.bin {message}"):
        _ = data.train[1600:1700]


def test_the_fingerprint_tells_which_file_changed_and_reads_little(folder: Path) -> None:
    before = tokens.load(DataConfig(tokens=str(folder))).fingerprint
    assert tokens.load(DataConfig(tokens=str(folder))).fingerprint == before
    values = TEXT[3000:4000].copy()
    values[-1] += 1
    write(folder / "text_train_000004.bin", values)
    after = tokens.load(DataConfig(tokens=str(folder))).fingerprint
    (changed,) = set(after.splitlines()) - set(before.splitlines())
    assert changed.startswith("text_train_000004.bin 3024 ")


def test_the_fingerprint_has_the_manifests_checksums(folder: Path) -> None:
    sha256 = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.bin")}
    (folder / "manifest.json").write_text(json.dumps({"sha256": sha256}))
    lines = tokens.load(DataConfig(tokens=str(folder))).fingerprint.splitlines()
    assert all(digest in "".join(lines) for digest in sha256.values())


def test_a_run_is_not_continued_on_other_tokens(tmp_path: Path, folder: Path, tiny: RunConfig) -> None:
    model = dataclasses.replace(tiny.language.model, vocab_size=50257)
    data = dataclasses.replace(tiny.language.data, tokens=str(folder))
    task_config = dataclasses.replace(tiny.language, model=model, data=data, sample_tokens=0)
    config = dataclasses.replace(tiny, task=task_config, train=dataclasses.replace(tiny.train, num_steps=5))
    task, run = launch.start(config, tmp_path, "run", numbered=False)
    train(task, config, run, quiet=True)
    (run.path / "summary.json").unlink()
    write(folder / "text_train_000001.bin", TEXT[:3])
    with pytest.raises(InputError, match=r"changed since the run began.*was: text_train_000001.bin 1030 .*is: text_tr"):
        launch.resume(run, quiet=True)


def test_sampling_needs_a_tokenizer_and_says_so_before_training(
    folder: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiktoken

    from mars_lab.data.tokenizer import gpt2_encoding

    def offline(name: str) -> Any:
        raise ConnectionError(name)

    gpt2_encoding.cache_clear()
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    model = dataclasses.replace(tiny.language.model, vocab_size=50304)
    config = dataclasses.replace(tiny.language, model=model, data=DataConfig(tokens=str(folder)))
    with pytest.raises(InputError, match=r"can't be downloaded \(ConnectionError\).*TIKTOKEN_CACHE_DIR.*--sample-tok"):
        LanguageTask(config, seed=0)
    task = LanguageTask(dataclasses.replace(config, sample_tokens=0), seed=0)
    assert task.batch(0, 2).shape == (2, 17)
    assert torch.equal(task.batch(1, 1), task.batch(0, 2)[1:])
