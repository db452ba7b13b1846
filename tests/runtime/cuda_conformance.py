# SPDX-License-Identifier: Apache-2.0
"""Runs in a process of its own, on a driver library that is host memory: the device layer with the real cuda-core.

cuda-core and cuda-bindings are the installed ones and convert every argument and result as they always do; behind them
``libcuda_host.c`` does what the driver would. Prints one line of JSON.

Arguments: path of the driver library.
"""

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Before anything looks for it; the bindings find its functions among those of the process.
LIBRARY = ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
for count in ("host_used", "host_graphs", "host_streams", "host_events"):
    getattr(LIBRARY, count).restype = ctypes.c_size_t
LIBRARY.host_limit.argtypes = [ctypes.c_size_t]

import numpy as np  # noqa: E402

from ltxrt.bundle import Bundle  # noqa: E402
from ltxrt.engine import iterate  # noqa: E402
from ltxrt.engine_device import DeviceEngine  # noqa: E402
from ltxrt.engine_onnx import OnnxEngine  # noqa: E402
from ltxrt.engine_onnx_cuda import OnnxCudaNetwork, OnnxPlacement  # noqa: E402
from ltxrt.errors import EngineError  # noqa: E402
from ltxrt.graph import IdlePool, capture_graph  # noqa: E402
from ltxrt.stream import Device, open_device  # noqa: E402


def round_trips(device: Device) -> list[str]:
    """Types and sizes that came back as they went."""
    found = []
    rng = np.random.default_rng(1)
    for dtype in ("float32", "float16", "int64", "uint8", "bool"):
        for shape in ((0,), (1,), (3, 5, 7), (1, 4097)):
            values = (rng.standard_normal(shape) * 50).astype(dtype)
            if np.array_equal(np.asarray(device.place(values)), values):
                found.append(f"{dtype}{list(shape)}")
    return found


def parts(device: Device) -> bool:
    values = np.arange(2 * 5 * 7, dtype=np.float32).reshape(1, 2, 5, 7)
    part = device.part(device.place(values), 2, 1, 4)
    return np.array_equal(np.asarray(part), values[:, :, 1:4])


def in_a_new_thread(work: Callable[[], Any]) -> Any:
    """In a thread in which nothing of CUDA has been called yet."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def elsewhere(device: Device) -> bool:
    """Everything that a clip asks of the device, each in a thread of its own: whoever takes its events may change."""
    values = np.arange(3000, dtype=np.float32).reshape(1, 3, 1000)
    tensor = in_a_new_thread(lambda: device.place(values))
    part = in_a_new_thread(lambda: device.part(tensor, 1, 1, 2))
    in_a_new_thread(lambda: device.write(tensor, np.ones_like(values)))
    copy = in_a_new_thread(part.fetch)
    found = in_a_new_thread(copy.wait)
    return in_a_new_thread(device.free_bytes) > 0 and np.array_equal(found, values[:, 1:2])


def graph(device: Device) -> dict[str, Any]:
    """Copies and a word captured once, replayed on other contents."""
    source, target = device.place(np.arange(8, dtype=np.float32)), device.place(np.zeros(8, np.float32))
    flag = device.place(np.zeros(1, np.uint32))

    def work(stream: Any) -> None:
        stream.copy(target.address, source.address, source.nbytes)
        stream.write_word(flag.address, 77)

    captured = capture_graph(device, work, "work")
    first = np.asarray(target).tolist()
    device.write(source, np.full(8, 5, np.float32))
    device.write(flag, np.zeros(1, np.uint32))
    untouched = np.asarray(target).tolist()
    captured.launch(device.compute)
    found = {
        "nodes": captured.nodes,
        "first": first,
        "untouched": untouched,
        "replayed": np.asarray(target).tolist(),
        "flag": int(np.asarray(flag)[0]),
        "alive": LIBRARY.host_graphs(),
        "empty": message(lambda: capture_graph(device, lambda stream: None, "nothing")),
        "failed": message(lambda: capture_graph(device, fails_when_captured(device), "failing")),
    }
    captured.close()
    return {**found, "closed": LIBRARY.host_graphs()}


def fails_when_captured(device: Device) -> Callable[[Any], None]:
    def work(stream: Any) -> None:
        if stream is not device.compute:
            raise EngineError("failing: does not run")

    return work


def message(work: Callable[[], object]) -> str:
    try:
        work()
    except EngineError as error:
        return str(error)
    return "no error"


def memory(device: Device) -> dict[str, Any]:
    """What was allocated is given back, and what is too much is refused in words."""
    gc.collect()
    before = LIBRARY.host_used()
    kept = device.place(np.zeros(1000, np.float32))
    more = LIBRARY.host_used() - before
    del kept
    gc.collect()
    LIBRARY.host_limit(before + 2**20)
    refused = message(lambda: device.allocate(2**21))
    return {"more": more, "after": LIBRARY.host_used() - before, "refused": refused}


def loop(device: Device) -> dict[str, Any]:
    """The denoiser's loop on ONNX Runtime's CPU provider, bound to this device's memory, against the CPU engine.

    Each step is taken in another thread, as a server may take the pieces of a clip.
    """
    bundle = Bundle.open()
    entry = bundle.network("high", "denoiser")
    ports = tuple(port.spec() for port in entry.inputs), tuple(port.spec() for port in entry.outputs)
    path = bundle.file(entry.file)
    placement = OnnxPlacement(provider="CPUExecutionProvider", memory="cpu")
    network = OnnxCudaNetwork("denoiser", path, ports, device, placement)
    engine = DeviceEngine(("denoiser", *ports), network, device, IdlePool(1))
    sizes = {"Nv": 12, "Na": 7, "f": 2, "h": 2, "w": 3}
    rng = np.random.default_rng(2)
    feeds = {
        spec.name: (rng.standard_normal([s if isinstance(s, int) else sizes[s] for s in spec.shape]) * 0.3).astype(
            spec.dtype
        )
        for spec in ports[0]
    }
    feeds["token_row"] = np.ones(12, np.int64)
    levels = [
        {"sigma": np.array([now], np.float32), "sigma_next": np.array([after], np.float32)}
        for now, after in ((1, 0.5), (0.5, 0.2), (0.2, 0))
    ]
    plain = OnnxEngine("denoiser", path, *ports, threads=1).capture(feeds)
    wanted = [np.array(step["latent_next"]) for step in iterate(plain, levels, {"latent_next": "latent"})]
    capture = in_a_new_thread(lambda: engine.capture(feeds))
    steps = iterate(capture, levels, {"latent_next": "latent"})
    found = []
    while step := in_a_new_thread(lambda: next(steps, None)):
        found.append(in_a_new_thread(lambda kept=step: np.asarray(kept["latent_next"])))
    return {"steps": len(found), "equal": all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))}


def main() -> None:
    device = open_device()
    found: dict[str, Any] = {
        "gpu": device.gpu.name,
        "capability": list(device.gpu.compute_capability),
        "round_trips": round_trips(device),
        "parts": parts(device),
        "elsewhere": elsewhere(device),
        "graph": graph(device),
        "loop": loop(device),
        "memory": memory(device),
        "streams": LIBRARY.host_streams(),
    }
    events = LIBRARY.host_events()
    for _ in range(50):
        np.asarray(device.place(np.zeros(10, np.float32)))
    found["events_leaked"] = LIBRARY.host_events() > events + 10
    device.close()
    found["streams_closed"] = LIBRARY.host_streams()
    print(json.dumps(found))


main()
