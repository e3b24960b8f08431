"""Text to tokens and back: the bytes themselves, or a Hugging Face tokenizer.json."""
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ..parallel.errors import UserError

__all__ = ["ByteTokenizer", "FileTokenizer", "Tokenizer", "load_tokenizer"]

# What the usual families call the token between two documents.
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
    @property
    def vocab_size(self) -> int: ...                                  # largest token + 1
    @property
    def eod(self) -> int | None: ...                                  # stands after each document; None: nothing does
    @property
    def identity(self) -> str: ...                                    # equal for tokenizers that give equal tokens
    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...


class ByteTokenizer:
    """Token = byte of the UTF-8 text; 256 ends a document."""

    vocab_size, eod, identity = 257, 256, "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json, with truncation, padding and special tokens off: every token of the text, and only those."""

    def __init__(self, path: str):
        way_out = "give data.tokenizer the path of a Hugging Face tokenizer.json, or leave it at bytes"
        try:
            content = Path(path).read_bytes()
        except OSError as e:
            raise UserError(f"data.tokenizer must be bytes or a file that can be read, got {path}: {e.strerror}; "
                            f"{way_out}") from None
        try:
            from tokenizers import Tokenizer as HFTokenizer
        except ImportError:
            raise UserError(f"data.tokenizer={path} needs the package tokenizers: pip install tokenizers; "
                            f"or leave data.tokenizer at bytes") from None
        try:
            self._tokenizer = HFTokenizer.from_str(content.decode())
        except Exception as e:                                        # tokenizers raises bare Exception
            raise UserError(f"data.tokenizer must be a valid tokenizer.json, got {path}: {e}; {way_out}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocab:
            raise UserError(f"data.tokenizer must have a vocabulary, got {path} with none; {way_out}")
        self.vocab_size: int = max(vocab.values()) + 1                # ids may have holes
        self.eod: int | None = next((vocab[w] for w in END_OF_DOCUMENT if w in vocab), None)
        self.identity = hashlib.blake2b(content, digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """As `encode`, on all cores."""
        return [e.ids for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)


def load_tokenizer(name: str) -> ByteTokenizer | FileTokenizer:
    """`bytes`, or the path of a tokenizer.json. Raises: UserError when there is none, or tokenizers is missing."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(name)
