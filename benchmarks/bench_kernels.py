# SPDX-License-Identifier: Apache-2.0
"""How fast is every kernel, and how far from the speed of a plain copy?

Sizes are the 22B model's at 1280x704, 121 frames. Rules: times are the GPU's own, between two events; before each
launch a buffer eight times as large as the L2 cache is written, so that nothing is warm; the ceiling is the device's
own copy of 1 GiB, under the same rules, counting what is read and what is written. GB/s counts every input and output
once. Whether results are right is asked elsewhere (``pytest -m gpu tests/kernels``). The record is written anew after
every kernel, so that a run that is cut off leaves what it had.

``--dry-run`` needs no GPU: it compiles for every architecture and prints the launches.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import RESULTS, Timing, record

from ltxrt.doctor import nvidia
from ltxrt_kernels.ops import OPS
from ltxrt_kernels.program import ARCHITECTURES, program
from ltxrt_kernels.spec import Problem

PACKAGES = ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "numpy")
COPY_BYTES = 1 << 30
#: Two would empty L2. Writing eight (0.4 GB on an H100, about 0.15 ms) also takes longer than Python needs to hand over
#: what follows; where the device has to wait for the host, the wait would count as the kernel's time.
COLD = 8


def main() -> int:
    """Measure, or say what would be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="*", choices=OPS, default=list(OPS))
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--dry-run", action="store_true", help="compile and print the launches, without a GPU")
    options = parser.parse_args()
    problems = [problem for name in options.ops for problem in OPS[name].production]
    if options.dry_run:
        dry_run(problems)
        return 0
    found = nvidia()
    if found.status != "ok":
        print(f"no GPU to measure on: {found.detail}; --dry-run needs none", file=sys.stderr)
        return 1
    print(measure(problems, options.repeats, options.out))
    return 0


def dry_run(problems: Iterable[Problem]) -> None:
    """Compile every launch for every architecture, and print what each would use."""
    from ltxrt_kernels.nvrtc import compile_program, identity

    print(f"NVRTC {identity().version}; nothing here has run on a GPU")
    print(f"{'launch':<84} {'MB':>7} {'blocks':>7} {'threads':>7}  registers and occupancy by architecture")
    for problem in problems:
        launch = problem.launch()
        used = {name: compile_program(program(problem, name)).resources for name in ARCHITECTURES}
        cells = [
            f"{name[3:]}: {r.registers} {r.occupancy(name, launch.block):.0%}"
            for name, r in used.items()
            if r is not None
        ]
        blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
        print(f"{problem!s:<84} {problem.moved_bytes / 1e6:7.1f} {blocks:7} {launch.block:7}  {', '.join(cells)}")


def measure(problems: Iterable[Problem], repeats: int, out: Path) -> str:
    """Time every launch on the first GPU; the record's path."""
    import tempfile

    from ltxrt_kernels.cache import CubinCache
    from ltxrt_kernels.device import DeviceTensors, opened_device
    from ltxrt_kernels.launch import DeviceKernels

    with opened_device() as (device, stream), tempfile.TemporaryDirectory() as folder:
        kernels = DeviceKernels(device, CubinCache(Path(folder)))
        cold = device.allocate(COLD * device.properties.l2_cache_size, stream=stream)
        source, target = (device.allocate(COPY_BYTES, stream=stream) for _ in range(2))
        copy = device_times(lambda: source.copy_to(target, stream=stream), stream, cold, repeats)
        source.close(stream)
        target.close(stream)
        ceiling = 2 * COPY_BYTES / copy.median / 1e9
        results: dict[str, Any] = {"copy": {"gb_per_second": round(ceiling, 1), **asdict(copy)}, "kernels": {}}
        path = record("kernels", PACKAGES, results, out)
        for problem in problems:
            loaded = kernels.load(problem)
            with DeviceTensors(device, stream, problem) as tensors:
                tensors.upload(OPS[problem.op].generate_inputs(problem, 0))
                addresses = tensors.addresses

                def work(launch: Any = loaded, at: dict[str, int] = addresses) -> None:
                    launch.launch(stream, at)

                times = device_times(work, stream, cold, repeats)
            results["kernels"][str(problem)] = described(problem, times, ceiling)
            path = record("kernels", PACKAGES, results, out)
    return str(path)


def device_times(work: Callable[[], object], stream: Any, cold: Any, repeats: int) -> Timing:
    """Seconds between two events around ``work``, each time with a cold L2; ten runs before are not counted.

    The host stays ahead: writing ``cold`` takes the device longer than the host needs to enqueue what follows.
    """
    from cuda.core import EventOptions

    timed = EventOptions(timing_enabled=True)
    events: list[tuple[Any, Any]] = []
    for _ in range(repeats + 10):
        cold.fill(0, stream=stream)
        begin = stream.record(options=timed)
        work()
        events.append((begin, stream.record(options=timed)))
    stream.sync()
    seconds = sorted((end - begin) / 1e3 for begin, end in events[10:])
    p10, median, p90 = (seconds[round(fraction * (repeats - 1))] for fraction in (0.1, 0.5, 0.9))
    return Timing(median, p10, p90, repeats)


def described(problem: Problem, times: Timing, ceiling: float) -> dict[str, Any]:
    """One row of the record."""
    speed = problem.moved_bytes / times.median / 1e9
    return {
        "op": problem.op,
        "moved_bytes": problem.moved_bytes,
        "gb_per_second": round(speed, 1),
        "share_of_copy": round(speed / ceiling, 3),
        **asdict(times),
    }


if __name__ == "__main__":
    sys.exit(main())
