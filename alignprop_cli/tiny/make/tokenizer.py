"""The tokenizer of the embedded model: CLIP's byte-pair encoding, with one token for each word."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

from transformers import CLIPTokenizer

from alignprop_cli.tiny.language import scenes

MAX_LENGTH = 16
"""Tokens of a prompt, start and end included; the longest prompt of the language has 12."""

# As in CLIP, the vocabulary begins with all letters, within a word and at its end ("a", "a</w>").
_LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]
START, END = "<|startoftext|>", "<|endoftext|>"


def save(directory: Path) -> CLIPTokenizer:
    """Write the tokenizer in the formats of both old and new readers, and return it."""
    words = sorted({word for scene in scenes() for word in scene.prompt.split()})
    merges = _learn(words)
    tokens = [*_LETTERS, *(letter + "</w>" for letter in _LETTERS), *(a + b for a, b in merges)]
    # The end token gets the highest number: open_clip pools the features at the largest token.
    vocab = {token: number for number, token in enumerate([*tokens, START, END])}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(vocab, indent=0), encoding="utf-8")
    # Readers skip the first line of merges.txt.
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        str(directory / "vocab.json"),
        str(directory / "merges.txt"),
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=MAX_LENGTH,
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def _learn(words: list[str]) -> list[tuple[str, str]]:
    """Return the merges, the most frequent pair first, until each word is one token."""
    # "red" begins as "r", "e", "d</w>".
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in pieces):
        pairs = Counter(pair for word in pieces for pair in itertools.pairwise(word))
        # Sorted, so that of equally frequent pairs the choice is the same in every run.
        best = max(sorted(pairs), key=lambda pair: pairs[pair])
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    """Return the pieces of a word, with each occurrence of a pair joined."""
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
