# SPDX-License-Identifier: Apache-2.0
"""A small tokenizer of Gemma's kind: byte-pair merges with byte fallback, "▁" for spaces, a leading ``<bos>``.

The pieces are learned here rather than by a library's trainer, so that no library version decides the bytes.
The file format is that of github huggingface/tokenizers (``tokenizer.json``, version 1.0).
"""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

__all__ = ["VOCABULARY", "tokenizer_config", "tokenizer_json"]

#: Entries of the vocabulary.
VOCABULARY = 768

_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
_BOS = _SPECIAL.index("<bos>")
_SPACE = "\u2581"
#: Every printable ASCII character has a piece of its own; the rest goes through bytes.
_CHARACTERS = (_SPACE, *(chr(code) for code in range(0x21, 0x7F)))


def tokenizer_json(corpus: Iterable[str]) -> dict[str, Any]:
    """The content of ``tokenizer.json`` for a tokenizer trained on ``corpus``.

    Raises:
        ValueError: The corpus has too few distinct pieces for the vocabulary.
    """
    pieces, merges = _learn(corpus)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(index, content) for index, content in enumerate(_SPECIAL)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_template("SpecialToken", "<bos>", 0), _template("Sequence", "A", 0)],
            "pair": [
                _template("SpecialToken", "<bos>", 0),
                _template("Sequence", "A", 0),
                _template("SpecialToken", "<bos>", 1),
                _template("Sequence", "B", 1),
            ],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [_BOS], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": [list(pair) for pair in merges],
        },
    }


def tokenizer_config(model_max_length: int) -> dict[str, Any]:
    """The content of ``tokenizer_config.json``; ``model_max_length`` is the context length."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "model_max_length": model_max_length,
        "pad_token": "<pad>",
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }


def _learn(corpus: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Vocabulary and merges: the most frequent pair first, of equally frequent ones the first by code point."""
    pieces = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *_CHARACTERS]
    known, merges = set(pieces), list[tuple[str, str]]()
    words = {tuple(word): count for word, count in _words(corpus).items()}
    while len(pieces) < VOCABULARY:
        pairs = Counter[tuple[str, str]]()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            raise ValueError(f"the corpus has pieces for {len(pieces)} entries, not for {VOCABULARY}")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_merged(word, best): count for word, count in words.items()}
        piece = "".join(best)
        if piece not in known:
            known.add(piece)
            pieces.append(piece)
    return pieces, merges


def _words(corpus: Iterable[str]) -> Counter[str]:
    """Words with the space in front of them; the words of a text are separate, so no piece spans two."""
    words = Counter[str]()
    for text in corpus:
        head, *rest = text.split(" ")
        words.update([head, *(_SPACE + word for word in rest)])
    return words


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    index = 0
    while index < len(word):
        if word[index : index + 2] == pair:
            merged.append("".join(pair))
            index += 2
        else:
            merged.append(word[index])
            index += 1
    return tuple(merged)


def _added_token(index: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content, **flags}


def _template(kind: str, name: str, type_id: int) -> dict[str, Any]:
    return {kind: {"id": name, "type_id": type_id}}
