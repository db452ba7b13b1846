# SPDX-License-Identifier: Apache-2.0
"""Prompt to token ids, as the reference does it: stripped, BOS first, no EOS, cut at the context length.

Source: Lightricks/LTX-2 packages/ltx-core/src/ltx_core/text_encoders/gemma/tokenizer.py. There is no padding here: the
text encoder takes the real tokens alone.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .errors import BundleError

__all__ = ["PromptTokenizer", "TokenizedPrompt"]


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """Token ids [1, n] int64, and how many tokens did not fit."""

    input_ids: NDArray[np.int64]
    dropped_tokens: int


class PromptTokenizer:
    """The bundle's tokenizer.

    Args:
        tokenizer: With a ``<bos>`` token; its own truncation and padding are turned off.
        context_tokens: Most tokens of a prompt, BOS included.

    Raises:
        BundleError: The tokenizer has no ``<bos>``.
    """

    def __init__(self, tokenizer: Tokenizer, context_tokens: int) -> None:
        bos = tokenizer.token_to_id("<bos>")
        if bos is None:
            raise BundleError("the bundle's tokenizer has no <bos> token")
        self._tokenizer = tokenizer
        self._bos = int(bos)
        self._context_tokens = context_tokens
        tokenizer.no_truncation()
        tokenizer.no_padding()

    @classmethod
    def open(cls, path: Path, context_tokens: int) -> "PromptTokenizer":
        """Read ``tokenizer.json``.

        Raises:
            BundleError: It cannot be read, is no tokenizer, or lacks ``<bos>``.
        """
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise BundleError(f"{path} is not a tokenizer: {error}") from error
        return cls(tokenizer, context_tokens)

    def encode(self, prompt: str) -> TokenizedPrompt:
        """Token ids of a prompt; what exceeds the context is cut off at the end and counted."""
        ids = list(self._tokenizer.encode(prompt.strip()).ids)
        if not ids or ids[0] != self._bos:
            ids.insert(0, self._bos)
        kept = ids[: self._context_tokens]
        return TokenizedPrompt(np.array([kept], np.int64), len(ids) - len(kept))
