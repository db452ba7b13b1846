# SPDX-License-Identifier: Apache-2.0
"""Strict reading of a config section: every key is known, and every value is one that is supported.

A checkpoint's config decides the arithmetic. A flag that is misread, or whose absence is filled with a default,
gives a model that runs and is wrong, so nothing is guessed here: what is not understood is refused by name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ltxrt.errors import ExportError, shown

__all__ = ["Section"]


@dataclass(frozen=True, slots=True)
class Section:
    """One JSON object of a config, and its dotted path for messages.

    Every method raises ExportError, which names the key, the value that stands there and what is supported.
    """

    path: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any], key: str, parent: str = "") -> "Section":
        """The object under ``key``."""
        path = f"{parent}.{key}" if parent else key
        if key not in config:
            raise ExportError(f"config: {path} is missing; supported: an object")
        if not isinstance(config[key], Mapping):
            raise refused(path, config[key], "an object")
        return cls(path, config[key])

    def child(self, key: str) -> "Section":
        """The object under ``key`` of this one."""
        return Section.of(self.values, key, self.path)

    def only(self, *known: Iterable[str]) -> None:
        """Refuse every key that is in none of ``known``."""
        unknown = sorted(set(self.values).difference(*known))
        if unknown:
            raise ExportError(
                f"config: {self.path}.{unknown[0]} = {shown(self.values[unknown[0]], 60)} is an unknown key"
                f" ({len(unknown)} unknown in all); supported: the keys of LTX-2.3"
            )

    def required(self, key: str) -> Any:
        """The value under ``key``, which must be there."""
        if key not in self.values:
            raise ExportError(f"config: {self.path}.{key} is missing; there is no safe default")
        return self.values[key]

    def expect(self, fixed: Mapping[str, Any], *, optional: bool = False) -> None:
        """Check that each key of ``fixed`` has exactly that value, or, where ``optional``, is absent."""
        for key, supported in fixed.items():
            if optional and key not in self.values:
                continue
            value = self.required(key)
            # True == 1 in Python and in JSON decoders: the types count too, except between int and float.
            if value != supported or isinstance(value, bool) != isinstance(supported, bool):
                raise self.refuse(key, shown(supported, 60))

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1; ``default`` where the key may be absent."""
        value = self.required(key) if default is None else self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(key, "a whole number of at least 1")
        return value

    def number(self, key: str) -> float:
        """A finite number above 0."""
        value = self.required(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.refuse(key, "a finite number above 0")
        return float(value)

    def whole(self, key: str) -> int:
        """A whole number of at least 1 that may be written as a float, 1000.0."""
        value = self.number(key)
        if not value.is_integer():
            raise self.refuse(key, "a whole number of at least 1")
        return int(value)

    def sizes(self, key: str, length: int) -> tuple[int, ...]:
        """A list of ``length`` whole numbers of at least 1."""
        value = self.required(key)
        if not isinstance(value, list | tuple):
            raise self.refuse(key, f"a list of {length} whole numbers of at least 1")
        whole = [item for item in value if isinstance(item, int) and not isinstance(item, bool) and item >= 1]
        if len(whole) != length or len(value) != length:
            raise self.refuse(key, f"a list of {length} whole numbers of at least 1")
        return tuple(whole)

    def refuse(self, key: str, supported: str) -> ExportError:
        """The error for the value under ``key``, to be raised."""
        return refused(f"{self.path}.{key}", self.values.get(key), supported)


def refused(path: str, value: object, supported: str) -> ExportError:
    """The error for a value that is not supported, to be raised."""
    return ExportError(f"config: {path} = {shown(value)} is not supported; supported: {supported}")
