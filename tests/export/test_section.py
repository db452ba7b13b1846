# SPDX-License-Identifier: Apache-2.0
"""Strict reading of config sections: key, value and what is supported in every refusal."""

from collections.abc import Callable
from typing import Any

import pytest

from ltxrt.errors import ExportError
from ltxrt_export.section import Section

SECTION = Section(
    "s", {"yes": True, "one": 1, "n": 3, "f": 2.5, "k": 1000.0, "list": [1, 2], "nan": float("nan"), "o": {}}
)


def test_reads() -> None:
    assert SECTION.size("n") == 3
    assert SECTION.size("absent", 7) == 7
    assert SECTION.number("f") == 2.5
    assert SECTION.whole("k") == 1000
    assert SECTION.sizes("list", 2) == (1, 2)
    assert SECTION.child("o") == Section("s.o", {})
    SECTION.expect({"yes": True, "n": 3.0})
    SECTION.expect({"absent": 5}, optional=True)
    SECTION.only(("yes", "one", "n", "f"), {"k": 0, "list": 0, "nan": 0, "o": 0})


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda s: s.size("absent"), r"config: s\.absent is missing"),
        (lambda s: s.size("f"), r"config: s\.f = 2\.5 is not supported; supported: a whole number"),
        (lambda s: s.size("yes"), r"s\.yes = True is not supported"),
        (lambda s: s.number("nan"), r"s\.nan = nan is not supported; supported: a finite number above 0"),
        (lambda s: s.whole("f"), r"s\.f = 2\.5"),
        (lambda s: s.sizes("list", 3), r"s\.list = \[1, 2\] is not supported; supported: a list of 3"),
        (lambda s: s.sizes("n", 1), r"s\.n = 3 is not supported; supported: a list of 1"),
        (lambda s: s.child("n"), r"s\.n = 3 is not supported; supported: an object"),
        (lambda s: s.child("absent"), r"s\.absent is missing; supported: an object"),
        (lambda s: s.expect({"yes": False}), r"s\.yes = True is not supported; supported: False"),
        (lambda s: s.expect({"one": True}), r"s\.one = 1 is not supported; supported: True"),
        (lambda s: s.expect({"yes": 1}), r"s\.yes = True is not supported; supported: 1"),
        (lambda s: s.expect({"n": 4}, optional=True), r"s\.n = 3 is not supported; supported: 4"),
        (lambda s: s.only(("yes",)), r"s\.f = 2\.5 is an unknown key \(7 unknown in all\)"),
    ],
)
def test_refuses(read: Callable[[Section], Any], message: str) -> None:
    with pytest.raises(ExportError, match=message) as error:
        read(SECTION)
    assert "\n" not in str(error.value)
