# SPDX-License-Identifier: Apache-2.0
"""Builds the engines of a bundle on a fake compiler that takes its time; to be killed."""

import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from ltxrt_export.engines.buckets import load_buckets
from ltxrt_export.engines.cache_key import BuildOptions
from ltxrt_export.engines.engine_set import build_engines, plan_engines
from ltxrt_export.engines.environment import Toolchain
from ltxrt_export.engines.store import EngineStore

HERE = Path(__file__).parent


def load(name: str) -> Any:
    spec = spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    conftest, fake = load("conftest"), load("fake_tensorrt").FakeTensorRT()
    fake.steps, fake.on_step = 10, lambda step: time.sleep(0.01)
    fake.plan = [bytes([index % 256]) * 4096 for index in range(64)]
    tools = Toolchain(fake, conftest.FakeDriver(), conftest.H200)
    options = BuildOptions()
    print("building", flush=True)
    try:
        with EngineStore(Path(sys.argv[1])) as store:
            plans = plan_engines(store, ["high"], tools, load_buckets(), options)
            for _ in build_engines(store, plans, tools, options):
                pass
        time.sleep(60)
    except KeyboardInterrupt:
        return 130
    return 0


sys.exit(main())
