"""generate: sample text from a trained run. One process, whatever layout trained it; the window slides at seq_length."""
from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from ..parallel.errors import UserError
from . import checkpoint
from .config import load_config
from .gpt import GPT
from .tokenizer import load_tokenizer
from .train import DTYPES


def sample(logits: Tensor, *, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token from logits [V]: the best at temperature 0, else from the softmax over the top_k best (0: all)."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.double() / temperature
    if 0 < top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


@torch.no_grad()
def generate(out: str | Path, prompt: str = "", *, tokens: int = 200, temperature: float = 0.8, top_k: int = 50, seed: int = 0,
             stream=None) -> str:
    """Continue `prompt` by up to `tokens` tokens with the newest checkpoint of `out`; returns prompt + continuation.

    out: the folder of a run, or of one of its checkpoints. stream: where to write as it goes (default: nowhere).
    Raises: UserError when there is no checkpoint."""
    out = Path(out)
    folder: Path | None = out
    if (out / "state.json").exists():
        out = out.resolve().parent.parent
    else:
        folder = checkpoint.find(out)
    if folder is None:
        raise UserError(f"generate: --out must be the folder of a run that saved a checkpoint, got {out}; train first: "
                        f"interlace train --out {out}")
    if not (out / "config.yaml").exists():
        raise UserError(f"generate: --out must hold the config.yaml that the run wrote, got {out} without it; write the run's config there")
    config = load_config(str(out / "config.yaml"), ["tp=1", "sp=false"])
    words = checkpoint.read_state(folder)
    tokenizer = load_tokenizer(checkpoint.tokenizer_of(words, out))
    model = GPT(config.model, vocab_size=words["model"]["vocab_size"], seed=config.trainer.seed, dtype=DTYPES[config.trainer.precision])
    checkpoint.load(folder, config, model, words["model"]["vocab_size"])
    model.eval()
    start = tokenizer.encode(prompt) or [tokenizer.eod if tokenizer.eod is not None else 0]
    ids, shown, generator = list(start), "", torch.Generator().manual_seed(seed)
    before = len(tokenizer.decode(start))

    def continuation() -> str:
        """Of all ids: decoded alone, a first word would lose the space before it."""
        return tokenizer.decode(ids)[before:]
    if stream:
        stream.write(prompt)
    for _ in range(tokens):
        window = torch.tensor([ids[-config.model.seq_length:]])
        h = model.hidden(window)[-1:]                                 # [1, 1, D]
        logits = model.lm_head(h)[0, 0, :model.vocab_size].float()    # padding cut off
        ids.append(sample(logits, temperature=temperature, top_k=top_k, generator=generator))
        if ids[-1] == tokenizer.eod:
            break
        text = continuation()
        if stream and not text.endswith("�"):                    # a character may take several tokens
            stream.write(text[len(shown):])
            stream.flush()
            shown = text
    if stream:
        stream.write(continuation()[len(shown):] + "\n")
    return prompt + continuation()


def main(out: str, prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> int:
    """`interlace generate`. A prompt's bytes are UTF-8 whatever the locale says, and what the terminal cannot show is escaped."""
    prompt = os.fsencode(prompt).decode(errors="replace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    generate(out, prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed, stream=sys.stdout)
    return 0
