import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlace.models import data as module
from interlace.models.data import Dataset, TokenFile, build_tokens, check_paths, default_files
from interlace.models.tokenizer import ByteTokenizer, load_tokenizer
from interlace.parallel.errors import UserError


def made(tmp_path, files, paths=None, tokenizer=None, **options):
    """The tokens of {name: bytes} below tmp_path/text."""
    for name, content in files.items():
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    paths = [str(tmp_path / "text" / p) for p in paths or [""]]
    return build_tokens(paths, tokenizer or ByteTokenizer(), tmp_path / "out", **options)


def tokens_of(n):
    tokens = TokenFile("", "<u2", n, 1, 255, 257, 256, "")
    tokens.__dict__["array"] = np.arange(n, dtype="<u2")
    return tokens


# ---- the order ------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64))
def test_order_is_a_permutation(n, key):
    assert sorted(module._permuted(x, n, key) for x in range(n)) == list(range(n))


def test_order_reaches_every_permutation_evenly():
    counts = {}
    for key in range(6000):
        p = tuple(module._permuted(x, 3, key) for x in range(3))
        counts[p] = counts.get(p, 0) + 1
    assert len(counts) == 6 and max(counts.values()) < 1.15 * min(counts.values())


def test_order_never_changes():
    """A checkpoint of any version resumes into the same samples."""
    assert [module._permuted(x, 32399, (1234 << 32) + 7) for x in range(5)] == [29798, 8489, 9353, 18698, 14330]


@given(windows=st.integers(1, 40), seq_length=st.integers(1, 9), extra=st.integers(0, 8), seed=st.integers(0, 2**32))
def test_an_epoch_is_every_window_once(windows, seq_length, extra, seed):
    dataset = Dataset(tokens_of(windows * seq_length + 1 + extra % seq_length), seq_length, seed)
    assert dataset.windows == windows
    for epoch in range(2):
        ids, labels = dataset.batch(epoch * windows, windows)
        assert ids.dtype == labels.dtype == np.int64
        assert sorted(ids.ravel()) == list(range(windows * seq_length))
        np.testing.assert_array_equal(labels, ids + 1)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=8), st.integers(0, 50))
def test_order_does_not_depend_on_how_it_is_cut(cuts, first):
    dataset = Dataset(tokens_of(101), 4, 3)
    whole = dataset.batch(first, sum(cuts))
    starts = [first + sum(cuts[:i]) for i in range(len(cuts))]
    parts = [dataset.batch(s, c) for s, c in zip(starts, cuts)]
    for i in range(2):
        np.testing.assert_array_equal(whole[i], np.concatenate([p[i] for p in parts]))


def test_epochs_and_seeds_differ():
    orders = [[Dataset(tokens_of(401), 4, seed).order(e + i) for i in range(100)] for seed in (0, 1) for e in (0, 100)]
    assert len({tuple(o) for o in orders}) == 4


# ---- the tokens -----------------------------------------------------------------------------------------------


def test_bytes_with_an_end_after_each_document(tmp_path):
    files = {"b.txt": b"yz", "a/c.txt": "é".encode(), "a/empty": b"", ".hidden": b"no", "a/pic": b"\0\1"}
    tokens = made(tmp_path, files)
    assert tokens.array.tolist() == [ord("y"), ord("z"), 256, 0xC3, 0xA9, 256]
    assert (tokens.count, tokens.documents, tokens.largest, tokens.dtype) == (6, 2, 256, "<u2")


def test_built_once_and_again_when_the_text_changes(tmp_path, monkeypatch):
    first = made(tmp_path, {"a.txt": b"hello"})
    stamp = os.stat(first.path).st_mtime_ns
    again = build_tokens([str(tmp_path / "text")], ByteTokenizer(), tmp_path / "out")
    assert again == first and os.stat(first.path).st_mtime_ns == stamp
    changed = made(tmp_path, {"a.txt": b"hello!"})
    assert changed.path != first.path and changed.digest != first.digest
    with open(changed.path, "ab") as f:                               # a damaged file is written anew
        f.write(b"x")
    assert made(tmp_path, {}).array.tolist() == changed.array.tolist()
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_rank_0_writes_the_others_wait(tmp_path):
    made(tmp_path, {"a.txt": b"hello"})
    def barrier():                                                    # while this rank waits, rank 0 writes
        assert not list((tmp_path / "out").glob("*.bin"))
        made(tmp_path, {})
    for f in (tmp_path / "out").iterdir():
        f.unlink()
    assert made(tmp_path, {}, rank=1, barrier=barrier).count == 6
    with pytest.raises(UserError, match="must not change while a run starts, got a change on rank 1"):
        made(tmp_path, {"a.txt": b"new"}, rank=1, barrier=lambda: None)


def test_what_counts_as_text(tmp_path):
    latin, wide = "é".encode("latin-1"), "text".encode("utf-16")
    tokens = made(tmp_path, {"good.py": b"ok", "latin.py": latin, "wide.py": wide, "cut.py": "é".encode()[:1]})
    assert tokens.array.tolist() == [*b"ok", 256]                     # found in a folder: UTF-8 or left out
    assert made(tmp_path, {}, ["latin.py"]).array.tolist() == [*latin, 256]       # named: any bytes without zeros
    with pytest.raises(UserError, match=r"wide\.py: binary, it holds zero bytes; convert"):
        made(tmp_path, {}, ["good.py", "wide.py"])


def test_text_that_breaks_late_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    tokens = made(tmp_path, {"a": b"0123456\xff", "b": "12é4".encode(), "c": b"abcdefgh\0"})
    assert tokens.array.tolist() == [*"12é4".encode(), 256]
    clean = made(tmp_path / "clean", {"b": "12é4".encode()})
    assert (tokens.digest, tokens.largest, tokens.documents) == (clean.digest, clean.largest, 1)


def test_extensions_and_excluded_folders(tmp_path):
    files = {"a.py": b"py", "b.md": b"md", "run/c.py": b"run", "d.PY": b"PY"}
    tokens = made(tmp_path, files, extensions=["py"], exclude=[tmp_path / "text/run"])
    assert tokens.array.tolist() == [*b"py", 256]
    assert made(tmp_path, {}, ["b.md"], extensions=["py"]).count == 3  # a named file always counts
    with pytest.raises(UserError, match=r"with extension \.rs, got none"):
        made(tmp_path, {}, extensions=[".rs"])


def test_default_is_the_standard_library(tmp_path):
    files = default_files()
    assert files == default_files() and 4 << 20 < sum(f.stat().st_size for f in files) <= 8 << 20
    assert not any({"site-packages", "test"} & set(f.parts) for f in files)
    tokens = build_tokens([], ByteTokenizer(), tmp_path)
    assert tokens.documents == sum(f.stat().st_size > 0 for f in files) and tokens.count > 4 << 20


# ---- a tokenizer.json -----------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path):
    """A tokenizer.json with holes in its ids, truncation, padding and special tokens switched on."""
    hf = pytest.importorskip("tokenizers")
    vocab = {"[UNK]": 0, "the": 1, "cat": 2, "sat": 70000, "<|endoftext|>": 9, "[CLS]": 8}
    tokenizer = hf.Tokenizer(hf.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    tokenizer.post_processor = hf.processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 8)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def test_tokenizer_json(tmp_path, words, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 16)
    tokenizer = load_tokenizer(words)
    assert (tokenizer.vocab_size, tokenizer.eod) == (70001, 9)
    assert tokenizer.encode("the cat sat") == [1, 2, 70000]
    tokens = made(tmp_path, {"a": b"the cat sat\n" * 40, "b": b"cat " * 40, "c": b"\xff"}, tokenizer=tokenizer)
    assert tokens.array.tolist() == [1, 2, 70000] * 40 + [9] + [2] * 40 + [9]
    assert tokens.dtype == "<u4" and tokens.largest == 70000
    assert tokens.fit_vocab(None) == 70001 and tokens.fit_vocab(80000) == 80000
    with pytest.raises(UserError, match=r"must be > 70000.*got 50000; leave it out"):
        tokens.fit_vocab(50000)
    assert tokenizer.decode([1, 2]) == "the cat"


def test_bytes_there_and_back():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([*tokenizer.encode("né"), 256]) == "né"
    assert tokenizer.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"


def test_broken_tokenizers(tmp_path, words, monkeypatch):
    with pytest.raises(UserError, match="bytes or a file that can be read"):
        load_tokenizer(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"valid tokenizer\.json"):
        load_tokenizer(str(tmp_path / "bad.json"))
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        load_tokenizer(words)


# ---- mistakes -------------------------------------------------------------------------------------------------


def test_paths_that_do_not_exist_are_all_named(tmp_path):
    with pytest.raises(UserError, match=r"2 problems(.|\n)*nope1(.|\n)*nope2"):
        check_paths([str(tmp_path / "nope1"), str(tmp_path), str(tmp_path / "nope2")])


@pytest.mark.parametrize("files, wanted", [
    ({}, "got none in"), ({"a": b""}, "1 files of which 1 are empty"),
    ({"a": b"\0", "b": b"\xff"}, "0 are empty and 2 are not text")])
def test_no_text(tmp_path, files, wanted):
    (tmp_path / "text").mkdir()
    with pytest.raises(UserError, match=wanted):
        made(tmp_path, files)
    assert not list(tmp_path.glob("out/*"))


def test_special_files_are_no_data(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="files and folders that exist"):
        check_paths([str(tmp_path / "pipe")])
    assert made(tmp_path, {"a": b"x"}, ["", ".."]).documents == 2     # tmp_path itself: its pipe is not read


def test_text_shorter_than_a_sequence(tmp_path):
    tokens = made(tmp_path, {"a": b"hello"})
    assert Dataset(tokens, 5, 0).windows == 1
    with pytest.raises(UserError, match=r"model.seq_length \+ 1 = 7 tokens, got 6 from 1 file.*set model.seq_length=5"):
        Dataset(tokens, 6, 0)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "out").write_text("a file, no folder")
    with pytest.raises(UserError, match=r"must be written to .*out, got"):
        made(tmp_path, {"a": b"x"})


def test_sidecar_is_plain_json(tmp_path):
    tokens = made(tmp_path, {"a": b"x"})
    assert json.loads(Path(tokens.path).with_suffix(".json").read_text())["count"] == tokens.count
