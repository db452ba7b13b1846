# SPDX-License-Identifier: Apache-2.0
"""The device layer through the installed cuda-core and cuda-bindings, on a driver library that is host memory.

``cuda_conformance.py`` runs our code on them in a process of its own. What this shows: every call, its arguments and
its results pass the real packages, and what the calls mean adds up. What only a GPU can show: that it is fast, that its
kernels run, and that nothing is forgotten which a driver does later than it is asked.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to compile a driver library with"),
    pytest.mark.skipif(sys.platform != "linux", reason="the driver library is for Linux"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    pytest.importorskip("cuda.core")
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    command = ["gcc", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    subprocess.run([*command, "-o", str(library), str(HERE / "libcuda_host.c"), "-ldl"], check=True)
    environment = {"LD_LIBRARY_PATH": str(library.parent), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    script = [sys.executable, "-X", "faulthandler", str(HERE / "cuda_conformance.py"), str(library)]
    ran = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_the_gpu_is_found_and_opened(found):
    assert (found["gpu"], found["capability"]) == ("Host", [9, 0])
    assert found["streams"] == 3
    assert found["streams_closed"] == 0


def test_tensors_go_there_and_come_back(found):
    assert len(found["round_trips"]) == 5 * 4
    assert found["parts"]


def test_any_thread_may_ask(found):
    assert found["elsewhere"]


def test_a_graph_is_captured_checked_replayed_and_destroyed(found):
    graph = found["graph"]
    assert graph["nodes"] == 2
    assert graph["first"] == graph["untouched"] == list(range(8))  # of the run before the capture
    assert graph["replayed"] == [5] * 8
    assert graph["flag"] == 77
    assert graph["empty"] == "nothing: the captured CUDA graph is empty"
    assert graph["failed"] == "failing: does not run"
    assert (graph["alive"], graph["closed"]) == (1, 0)


def test_the_denoiser_s_loop_gives_the_cpu_engine_s_bits(found):
    assert found["loop"] == {"steps": 3, "equal": True}


def test_memory_is_given_back_and_refused_in_words(found):
    assert found["memory"]["more"] == 4000
    assert found["memory"]["after"] == 0
    refused = found["memory"]["refused"]
    assert refused.startswith("the GPU fails in allocating 0.00 GiB: CUDA_ERROR_OUT_OF_MEMORY: ")
    assert refused.endswith("(0.00 GiB free on Host)")


def test_events_do_not_pile_up(found):
    assert not found["events_leaked"]
