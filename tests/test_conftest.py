# SPDX-License-Identifier: Apache-2.0
"""The ``gpu`` marker does what it says, in a pytest of its own and with a driver that we choose."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_TEST = """
import pytest

@pytest.mark.gpu
def test_on_the_gpu():
    pass
"""


@pytest.mark.parametrize(
    ("has_gpu", "required", "outcome"),
    [(False, False, "1 skipped"), (False, True, "1 error"), (True, False, "1 passed"), (True, True, "1 passed")],
)
def test_gpu_marker(tmp_path, has_gpu, required, outcome):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_it.py").write_text(_TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    if has_gpu:
        smi = tools / "nvidia-smi"
        smi.write_text("#!/bin/sh\necho 'NVIDIA H100, 580.1, 81559 MiB, 9.0'\n")
        smi.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "LTXRT_REQUIRE_GPU"}
    environment |= {"PATH": str(tools), "LTXRT_REQUIRE_GPU": "1" if required else "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert outcome in ran.stdout
    assert (ran.returncode == 0) == (outcome != "1 error")
