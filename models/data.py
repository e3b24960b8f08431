"""Text to training samples: find the files, write their tokens once to a memory-mapped file, cut it into windows.

    tokens = build_tokens(config.data.paths, load_tokenizer(config.data.tokenizer), out / "data", exclude=[out],
                          rank=rank, barrier=barrier)
    ids, labels = Dataset(tokens, config.model.seq_length, config.trainer.seed).batch(first, count)  # [count, S] int64

The order of samples is one endless sequence that depends on the seed alone: a layout only decides who reads which.
"""
import codecs
import hashlib
import json
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..parallel.errors import UserError, raise_problems
from .tokenizer import FileTokenizer, Tokenizer

__all__ = ["Dataset", "TokenFile", "build_tokens", "check_paths", "default_files"]

VERSION = 1                                                           # of the token file: raise it when tokens change
CHUNK = 1 << 20                                                       # bytes read, and at most tokenized, at a time
DEFAULT_BYTES = 8 << 20                                               # of the standard library: read in about a second
DEFAULT_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "encodings",
                "pydoc_data", "distutils", "__pycache__"}

# ---- which files ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """One file. `named`: the user gave this very file, so it is an error when it is no text."""

    path: Path
    size: int
    mtime_ns: int
    named: bool


def default_files() -> list[Path]:
    """Source of the running Python's standard library, sorted, up to DEFAULT_BYTES."""
    root, files, total = Path(sysconfig.get_path("stdlib")), [], 0
    for path in _walk(root, DEFAULT_SKIP):
        if path.suffix == ".py":
            total += path.stat().st_size
            if total > DEFAULT_BYTES:
                break
            files.append(path)
    return files


def check_paths(paths: Sequence[str], out: str | None = None) -> None:
    """Raise one UserError that names every path that is neither file nor folder, has a name that is no UTF-8, or is the folder `out`, which
    the run writes to. For the parent, before any rank."""
    shown = {p: os.fsencode(p).decode(errors="replace") for p in paths}
    raise_problems("data", [
        *(f"data.paths must be files and folders that exist, got {shown[p]}" for p in paths if not (Path(p).is_file() or Path(p).is_dir())),
        *(f"data.paths must have names in UTF-8, got {shown[p]}; rename it" for p in paths if os.fsencode(p) != shown[p].encode()),
        *(f"data.paths must not be --out, got {shown[p]}: the run would read its own files; choose a folder in it for --out"
          for p in paths if out is not None and Path(p).is_dir() and Path(p).resolve() == Path(out).resolve())])


def _walk(folder: Path, names: Set[str] = frozenset(), exclude: Set[Path] = frozenset()) -> Iterator[Path]:
    """Regular files below `folder` in a fixed order, without hidden ones and folders in `names` or `exclude`."""
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in names and not f.startswith(".")
                            and not (exclude and Path(here, f).resolve() in exclude))
        yield from (p for f in sorted(files) if not f.startswith(".") and (p := Path(here, f)).is_file())


def _sources(paths: Sequence[str], extensions: Sequence[str] | None, exclude: Set[Path]) -> list[Source]:
    check_paths(paths)
    if not paths:
        found = [(p, False) for p in default_files()]
        if not found:
            raise UserError("data.paths must be given here: this Python has no standard library source in "
                            f"{sysconfig.get_path('stdlib')}; add --data PATH")
    else:
        ends = tuple(e if e.startswith(".") else f".{e}" for e in extensions) if extensions else ("",)
        found = [(f, f == p) for p in map(Path, paths) for f in ([p] if p.is_file() else _walk(p, exclude=exclude))
                 if f == p or f.name.endswith(ends)]
        if not found:
            kinds = f" with extension {', '.join(extensions)}" if extensions else ""
            raise UserError(f"data.paths must hold text files{kinds}, got none in {', '.join(paths)}; "
                            f"give other paths{' or other data.extensions' if extensions else ''}")
    stats = [(p, p.stat(), named) for p, named in found]
    return [Source(p, s.st_size, s.st_mtime_ns, named) for p, s, named in stats if stat.S_ISREG(s.st_mode)]


# ---- their tokens ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenFile:
    """All tokens of a text, one after another, little-endian on disk. Opened on first use, never read as a whole."""

    path: str
    dtype: str                                                        # "<u2" or "<u4"
    count: int                                                        # tokens
    documents: int                                                    # files that gave them
    largest: int                                                      # token
    vocab_size: int                                                   # of the tokenizer
    eod: int | None
    digest: str                                                       # of the tokens: equal text, equal digest

    @cached_property
    def array(self) -> np.ndarray:
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.count,))

    def fit_vocab(self, vocab_size: int | None) -> int:
        """The vocabulary of a model on these tokens: its own if large enough, the tokenizer's if None."""
        if vocab_size is not None and vocab_size <= self.largest:
            raise UserError(f"model.vocab_size must be > {self.largest}, the largest token of the data, "
                            f"got {vocab_size}; leave it out to take the tokenizer's {self.vocab_size}")
        return vocab_size or self.vocab_size


def build_tokens(paths: Sequence[str], tokenizer: Tokenizer, folder: str | Path, *,
                 extensions: Sequence[str] | None = None, exclude: Sequence[str | Path] = (), rank: int = 0,
                 barrier: Callable[[], Any] | None = None) -> TokenFile:
    """The tokens of `paths` (empty: the standard library), written once to `folder` and found there afterwards.

    Args: extensions: of the files that count in a folder. exclude: folders to leave out, such as the run's own.
    rank, barrier: rank 0 writes while the others wait in `barrier()`, which every rank calls exactly once; where
    hosts do not share `folder`, give the rank on the host. Raises: UserError for a path that does not exist, a named
    file that is no text, no text at all, a folder that cannot be written.
    """
    sources = _sources(paths, extensions, {Path(p).resolve() for p in (*exclude, folder)})
    files = [(str(s.path.resolve()), s.size, s.mtime_ns, s.named) for s in sources]
    key = json.dumps([VERSION, tokenizer.identity, files])
    path = Path(folder) / f"{hashlib.blake2b(key.encode(), digest_size=10).hexdigest()}.bin"
    found = _open(path)
    if rank == 0 and found is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, sources, tokenizer)
        except OSError as e:
            raise UserError(f"the tokens of the data must be written to {folder}, got {e.strerror or e}; "
                            "free space there or choose another --out") from None
    if barrier is not None:
        barrier()
    if found is None and (found := _open(path)) is None:
        raise UserError(f"the files of data.paths must not change while a run starts, got a change on rank {rank}; "
                        "start again")
    return found


def _open(path: Path) -> TokenFile | None:
    try:
        found = TokenFile(str(path), **json.loads(path.with_suffix(".json").read_text()))
        return found if path.stat().st_size == found.count * np.dtype(found.dtype).itemsize else None
    except (OSError, ValueError, TypeError):                          # not there, or half of it
        return None


def _write(path: Path, sources: list[Source], tokenizer: Tokenizer) -> None:
    """Tokens, then what they are, each under a temporary name first: a reader sees all or nothing."""
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    documents, largest, digest = 0, 0, hashlib.blake2b(digest_size=16)
    end = np.array([] if tokenizer.eod is None else [tokenizer.eod], dtype)
    try:
        with open(temporary, "wb") as out:
            for source in sources:
                start, top, mark = out.tell(), largest, digest.copy()
                try:
                    for part in _tokens(source, tokenizer):
                        block = np.asarray(part, dtype)
                        top = max(top, int(block.max(initial=0)))
                        mark.update(block.tobytes())
                        out.write(block.tobytes())
                except _NotText as e:
                    if source.named:
                        raise UserError(f"data.paths must be text, got {source.path}: {e}; "
                                        "convert it to UTF-8 or leave it out") from None
                    out.seek(start)
                    out.truncate()
                    continue
                if out.tell() > start:
                    mark.update(end.tobytes())
                    out.write(end.tobytes())
                    documents, largest, digest = documents + 1, max([top, *end.tolist()]), mark
            count = out.tell() // np.dtype(dtype).itemsize
        if not count:
            empty = sum(s.size == 0 for s in sources)
            raise UserError(f"data.paths must hold UTF-8 text, got {len(sources)} files of which {empty} are empty and "
                            f"{len(sources) - empty} are not text; give other paths with --data")
        made = asdict(TokenFile("", dtype, count, documents, largest, tokenizer.vocab_size, tokenizer.eod,
                                digest.hexdigest()))
        del made["path"]
        temporary.replace(path)
        temporary.write_text(json.dumps(made, indent=1))
        temporary.replace(path.with_suffix(".json"))
    finally:
        temporary.unlink(missing_ok=True)


class _NotText(Exception):
    """Why a file is no text."""


def _tokens(source: Source, tokenizer: Tokenizer) -> Iterator[Any]:
    """The tokens of one file, in pieces. Bytes go through as they are; only a file found in a folder must be UTF-8."""
    try:
        with open(source.path, "rb") as f:
            if isinstance(tokenizer, FileTokenizer):
                for lines in _lines(f):
                    yield from tokenizer.encode_batch(lines)
                return
            decoder = codecs.getincrementaldecoder("utf-8")()
            for chunk in _chunks(f):
                if not source.named:
                    decoder.decode(chunk)
                yield np.frombuffer(chunk, np.uint8)
            if not source.named:
                decoder.decode(b"", final=True)
    except UnicodeDecodeError as e:
        raise _NotText(f"not UTF-8 ({e.reason} at byte {e.start})") from None
    except OSError as e:
        raise UserError(f"data.paths must be readable, got {source.path}: {e.strerror}; leave it out") from None


def _chunks(f: BinaryIO) -> Iterator[bytes]:
    while chunk := f.read(CHUNK):
        if b"\0" in chunk:
            raise _NotText("binary, it holds zero bytes")
        yield chunk


def _lines(f: BinaryIO) -> Iterator[list[str]]:
    """A document in pieces of about CHUNK, cut at line ends or spaces, several at a time for the tokenizer's cores."""
    pieces: list[str] = []
    decoder, held = codecs.getincrementaldecoder("utf-8")(), ""
    for chunk in _chunks(f):
        text = held + decoder.decode(chunk)
        cut = text.rfind("\n") + 1 or max(text.rfind(" "), 0) or len(text)
        held = text[cut:]
        pieces.append(text[:cut])
        if len(pieces) == 16:
            yield pieces
            pieces = []
    held += decoder.decode(b"", final=True)
    yield [*pieces, held] if held else pieces


# ---- their order ----------------------------------------------------------------------------------------------


class Dataset:
    """Sample i of the endless order: window `order(i)` of S + 1 tokens, windows S apart, shuffled anew each epoch."""

    def __init__(self, tokens: TokenFile, seq_length: int, seed: int):
        self.windows = (tokens.count - 1) // seq_length
        if self.windows < 1:
            raise UserError(f"the data must hold at least model.seq_length + 1 = {seq_length + 1} tokens, "
                            f"got {tokens.count} from {tokens.documents} file(s); add text with --data or "
                            f"set model.seq_length={max(1, tokens.count - 1)}")
        self.tokens, self.seq_length, self.seed = tokens, seq_length, seed

    def order(self, i: int) -> int:
        """The window of sample i: within each epoch of `windows` samples, every window once."""
        epoch, at = divmod(i, self.windows)
        return _permuted(at, self.windows, (self.seed << 32) + epoch)

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [S], labels [S]) int64: labels are ids one token on."""
        start = self.order(i) * self.seq_length
        window = self.tokens.array[start:start + self.seq_length + 1].astype(np.int64)
        return window[:-1], window[1:]

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels) of samples first .. first + count - 1, both [count, S] int64."""
        pairs = [self.sample(i) for i in range(first, first + count)]
        return np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])


def _permuted(x: int, n: int, key: int) -> int:
    """Where a permutation of range(n) chosen by `key` sends x: a Feistel network, walked until it lands below n.

    No table and no random generator of a library: constant memory at any n, the same order for ever."""
    half = max(1, -(-(n - 1).bit_length() // 2))
    mask = (1 << half) - 1
    keys = [_mix(_mix(key) + r) for r in range(6)]
    while True:
        left, right = x >> half, x & mask
        for k in keys:
            left, right = right, left ^ (_mix(k + right) & mask)
        x = left << half | right
        if x < n:
            return x


def _mix(x: int) -> int:
    """splitmix64's finisher."""
    x = (x + 0x9E3779B97F4A7C15) & (1 << 64) - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return x ^ x >> 31
