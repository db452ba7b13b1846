# SPDX-License-Identifier: Apache-2.0
"""Keys: who calls. Compared in constant time, kept and shown as digests only."""

import hashlib
import hmac

__all__ = ["Keys"]

_SCHEMES = frozenset(("bearer", "key"))


class Keys:
    """The keys that callers may use.

    Args:
        keys: In clear; only their digests are kept. Without any, everyone is the same caller.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def owner(self, authorization: str | None) -> str | None:
        """Who calls, as a short digest of the key; None for a key that is missing or wrong.

        Args:
            authorization: ``Bearer KEY``, or ``Key KEY``.
        """
        if not self._digests:
            return "anyone"
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # Every key is compared, whichever fits, so that time tells nothing.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return given.hex()[:16] if any(matches) and scheme.lower() in _SCHEMES else None
