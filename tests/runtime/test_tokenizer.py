# SPDX-License-Identifier: Apache-2.0
"""Prompts to token ids as the reference gives them: stripped, one BOS in front, no padding, cut at the context."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ltxrt.bundle import tiny_bundle_path
from ltxrt.errors import BundleError
from ltxrt.tokenizer import PromptTokenizer

WORDS = {"<unk>": 0, "<bos>": 1, "<pad>": 2, "a": 3, "man": 4, "speaks": 5}


def words(vocabulary=WORDS):
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def with_bos():
    tokenizer = words()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return tokenizer


@pytest.mark.parametrize("make", [words, with_bos])
def test_one_bos_stands_in_front(make):
    encoded = PromptTokenizer(make(), 8).encode("a man speaks")
    assert encoded.input_ids.tolist() == [[1, 3, 4, 5]]
    assert encoded.input_ids.dtype == np.int64
    assert encoded.dropped_tokens == 0


@pytest.mark.parametrize("prompt", ["a man", "  a man", "a man\n", "\t a man \r\n"])
def test_the_prompt_is_stripped(prompt):
    byte_level = Tokenizer(models.WordLevel({"<bos>": 1, **{char: ord(char) for char in "amn \t\r\n"}}, unk_token="a"))
    byte_level.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    ids = PromptTokenizer(byte_level, 64).encode(prompt).input_ids
    assert ids.tolist() == [[1, *map(ord, "a man")]]


@pytest.mark.parametrize("make", [words, with_bos])
@pytest.mark.parametrize(("context", "kept", "dropped"), [(4, 4, 0), (3, 3, 1), (2, 2, 2), (1, 1, 3)])
def test_what_exceeds_the_context_is_cut_at_the_end_and_counted(make, context, kept, dropped):
    encoded = PromptTokenizer(make(), context).encode("a man speaks")
    assert encoded.input_ids.tolist() == [[1, 3, 4, 5][:kept]]
    assert encoded.dropped_tokens == dropped


def test_the_tokenizers_own_truncation_and_padding_are_off():
    tokenizer = with_bos()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=16, pad_id=2, pad_token="<pad>")
    encoded = PromptTokenizer(tokenizer, 8).encode("a man speaks")
    assert encoded.input_ids.tolist() == [[1, 3, 4, 5]]
    assert encoded.dropped_tokens == 0


def test_nothing_left_is_a_bos_alone():
    assert PromptTokenizer(words(), 8).encode("  ").input_ids.tolist() == [[1]]


def test_unknown_words_are_the_unknown_token():
    assert PromptTokenizer(words(), 8).encode("a dragon").input_ids.tolist() == [[1, 3, 0]]


def test_a_tokenizer_without_bos_is_refused():
    with pytest.raises(BundleError, match="has no <bos> token"):
        PromptTokenizer(words({"<unk>": 0, "a": 1}), 8)


def test_a_file_is_read(tmp_path):
    path = tmp_path / "tokenizer.json"
    with_bos().save(str(path))
    assert PromptTokenizer.open(path, 3).encode("a man speaks").input_ids.tolist() == [[1, 3, 4]]


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", json.dumps({"model": {"type": "Other"}}), None])
def test_a_file_that_is_no_tokenizer(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer: ") as caught:
        PromptTokenizer.open(path, 8)
    assert len(str(caught.value).splitlines()) == 1


def test_the_tokenizer_that_ships_knows_every_character():
    tokenizer = PromptTokenizer.open(tiny_bundle_path() / "tokenizer.json", 1024)
    bos = tokenizer.encode("x").input_ids[0, 0]
    for prompt in ("a face that speaks", "ein Gesicht, das schön spricht", "顔が話す", "🙂"):
        ids = tokenizer.encode(prompt).input_ids
        assert ids[0, 0] == bos
        assert ids.shape[0] == 1
        assert ids.shape[1] > 1
        assert np.count_nonzero(ids == bos) == 1
