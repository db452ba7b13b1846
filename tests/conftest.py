# SPDX-License-Identifier: Apache-2.0
"""The ``gpu`` marker: skipped without an NVIDIA GPU, failed without one where the job promised one.

And signals as a terminal has them: a shell that runs the tests in the background has them ignore Ctrl-C, ``nohup`` has
them ignore SIGHUP, and the processes that tests start would inherit both.
"""

import os
import signal
from functools import cache

import pytest

from ltxrt.doctor import nvidia


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@cache
def _missing_gpu() -> str | None:
    """Why there is no GPU to test on."""
    found = nvidia()
    return None if found.status == "ok" else found.detail


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    missing = _missing_gpu()
    if missing is not None and os.environ.get("LTXRT_REQUIRE_GPU") == "1":
        pytest.fail(f"LTXRT_REQUIRE_GPU=1, but {missing}", pytrace=False)
    if missing is not None:
        pytest.skip(missing)
