# SPDX-License-Identifier: Apache-2.0
"""Engines of whole presets: kept, built, resumed, replaced, killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from ltxrt.bundle import Bundle, file_sha256
from ltxrt.errors import BundleError, EngineError, OutputError, RequestError
from ltxrt_export.engines import engine_set
from ltxrt_export.engines.buckets import load_buckets
from ltxrt_export.engines.cache_key import BuildOptions, key_digest
from ltxrt_export.engines.engine_set import build_engines, check_precision, plan_engines, required_networks
from ltxrt_export.engines.store import EngineStore, clone_bundle

BUCKETS = load_buckets()
SCRIPT = Path(__file__).parent / "build_forever.py"

#: Clones a bundle once undisturbed, then once for every operation on files that this took, killed before it, and once
#: more over what that left. A process for every run, forked from this one.
CLONED = """
import json, os, shutil, signal, sys
from pathlib import Path
from ltxrt.bundle import Bundle
from ltxrt.errors import BundleError
from ltxrt_export.engines.store import clone_bundle

source, out = Path(sys.argv[1]), Path(sys.argv[2])

def ended(kill_at=None):
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        count = 0

        def watch(event, arguments):
            nonlocal count
            where = [given for given in arguments if isinstance(given, (str, Path)) and str(out.parent) in str(given)]
            if event.startswith(("open", "os.")) and where:
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        clone_bundle(source, out)
        os.write(writing, str(count).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        count = pipe.read()
    return os.waitpid(process, 0)[1], count

def left():
    if not out.exists():
        return "nothing"
    try:
        return Bundle.open(out, verify=True).manifest.model_dump_json()
    except BundleError as error:
        return "empty" if not any(out.iterdir()) else f"damaged: {error}"

status, operations = ended()
assert status == 0
whole = left()
for at in range(1, int(operations) + 1):
    shutil.rmtree(out)
    if at % 2:
        out.mkdir()  # an empty folder may be given too
    killed, _ = ended(at)
    found = left()
    again, _ = ended()
    there = sorted(os.listdir(out.parent))
    print(json.dumps([killed, "whole" if found == whole else found, again, left() == whole, there]))
"""


def build(folder: Path, tools, presets=("high",), options: BuildOptions | None = None) -> dict[str, str]:
    """Build a bundle's engines; status by network."""
    options = options or BuildOptions()
    with EngineStore(folder) as store:
        plans = plan_engines(store, presets, tools, BUCKETS, options)
        steps = list(build_engines(store, plans, tools, options))
    return {step.network_key.partition("-")[0]: step.status for step in steps if step.status != "building"}


def check_whole(folder: Path, engines: int | None = None) -> None:
    """The bundle opens, and each of its engines is a plan that matches its hash, its key and its network."""
    manifest = Bundle.open(folder, verify=True).manifest
    for name, entry in manifest.engines.items():
        assert entry.key_sha256 == key_digest(entry.key)
        assert name in entry.file
        assert entry.network in manifest.networks
        assert manifest.files[entry.file].sha256 == file_sha256(folder / entry.file)
        assert json.loads((folder / entry.layers).read_text())["summary"]["layers"] > 0
    if engines is not None:
        assert len(manifest.engines) == engines


def test_all_networks_of_a_preset(bundle, tools) -> None:
    statuses = build(bundle, tools)
    assert set(statuses.values()) == {"built"}
    assert len(statuses) == 6
    check_whole(bundle, engines=6)


def test_nothing_is_built_twice(bundle, fake, tools) -> None:
    build(bundle, tools)
    before = (bundle / "manifest.json").read_bytes()
    fake.calls.clear()
    assert set(build(bundle, tools).values()) == {"kept"}
    assert fake.named("Builder.build") == []
    assert (bundle / "manifest.json").read_bytes() == before


def test_presets_that_share_networks_share_engines(bundle, tools) -> None:
    build(bundle, tools, ("high",))
    assert set(build(bundle, tools, ("low", "medium", "high", "maximum")).values()) == {"kept"}


def test_another_option_replaces_the_engine_of_this_gpu(bundle, tools) -> None:
    build(bundle, tools)
    old = set(Bundle.open(bundle).manifest.engines)
    assert set(build(bundle, tools, options=BuildOptions(optimization_level=1)).values()) == {"built"}
    new = Bundle.open(bundle).manifest.engines
    assert not old & set(new)
    check_whole(bundle, engines=6)
    plans = {path.name for path in (bundle / "engines").iterdir() if path.suffix == ".plan"}
    assert plans == {Path(entry.file).name for entry in new.values()}


def test_another_gpu_gets_engines_of_its_own(bundle, tools) -> None:
    build(bundle, tools)
    other = replace(tools, gpu=replace(tools.gpu, name="NVIDIA L40S", compute_capability=(8, 9)))
    assert set(build(bundle, other).values()) == {"built"}
    check_whole(bundle, engines=12)
    assert set(build(bundle, tools).values()) == {"kept"}


def test_a_damaged_engine_is_built_again(bundle, tools) -> None:
    build(bundle, tools)
    manifest = Bundle.open(bundle).manifest
    entry = next(iter(manifest.engines.values()))
    with EngineStore(bundle) as store:
        assert store.find(entry.network, entry.key) == entry
        (bundle / entry.file).unlink()
        assert store.find(entry.network, entry.key) is None


def test_a_build_that_fails_keeps_what_is_done(bundle, fake, tools) -> None:
    def fail(step: int) -> None:
        if len(fake.named("Builder.build")) == 3:
            fake.complaint = "something"

    fake.on_step = fail
    with pytest.raises(EngineError, match=r"image_encoder.*: TensorRT cannot build this network: something"):
        build(bundle, tools)
    check_whole(bundle, engines=2)
    fake.on_step, fake.complaint = lambda step: None, None
    statuses = build(bundle, tools)
    assert list(statuses.values()) == ["kept", "kept", "built", "built", "built", "built"]
    check_whole(bundle, engines=6)


def test_leaving_between_networks(bundle, tools) -> None:
    options = BuildOptions()
    with EngineStore(bundle) as store:
        plans = plan_engines(store, ["high"], tools, BUCKETS, options)
        with closing(build_engines(store, plans, tools, options)) as steps:
            next(step for step in steps if step.index == 1)
    check_whole(bundle, engines=1)


def test_timings_are_kept_in_the_bundle_by_gpu_and_version(bundle, tools) -> None:
    build(bundle, tools)
    (path,) = (bundle / "engines").glob("*.timing")
    assert path.name == "nvidia-h200-11.4.0.106.timing"
    assert path.read_bytes() == b"measured;" * 6


# --- refused before anything is built ---


def test_a_preset_that_the_bundle_lacks(bundle) -> None:
    with pytest.raises(RequestError, match=r"preset: 'ultra' is not allowed; allowed: .*high.* in this bundle"):
        required_networks(Bundle.open(bundle).manifest, ["high", "ultra"])


@pytest.mark.parametrize(
    ("precision", "capability", "message"),
    [
        ("fp8", (8, 6), "fp8 needs compute capability 8.9, NVIDIA H200 has 8.6"),
        ("fp8-mixed", (8, 0), "fp8 needs compute capability 8.9, NVIDIA H200 has 8.0"),
        ("bf16", (7, 5), "bf16 needs compute capability 8.0, NVIDIA H200 has 7.5"),
        ("fp8", (8, 9), None),
        ("fp16", (7, 5), None),
        ("bf16", (8, 0), None),
    ],
)
def test_a_precision_that_the_gpu_has_no_arithmetic_for(gpu, precision, capability, message) -> None:
    gpu = replace(gpu, compute_capability=capability)
    if message is None:
        check_precision("denoiser", precision, gpu)
    else:
        with pytest.raises(EngineError, match=f"^denoiser: {message}: take another preset$"):
            check_precision("denoiser", precision, gpu)


def test_a_gpu_that_is_too_small(bundle, fake, tools) -> None:
    small = replace(tools, gpu=replace(tools.gpu, memory_bytes=2**20))
    with pytest.raises(EngineError, match=r"its weights take 0\.0 GiB, NVIDIA H200 has 0\.0 GiB: take a GPU with more"):
        build(bundle, small)
    assert fake.calls == []


def test_a_disk_that_is_too_small(bundle, fake, tools, monkeypatch) -> None:
    class Usage:
        free = 5 * 2**20

    monkeypatch.setattr(engine_set.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(OutputError, match=r"the plans take about 0\.\d GiB, the disk has 0\.0 GiB free"):
        build(bundle, tools)
    assert fake.calls == []


# --- the store ---


def test_two_builds_in_one_bundle(bundle) -> None:
    with EngineStore(bundle), pytest.raises(OutputError, match="another build is at work in this bundle"):
        EngineStore(bundle)
    with EngineStore(bundle):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_bundle_that_cannot_be_written(bundle) -> None:
    bundle.chmod(0o500)
    with pytest.raises(OutputError, match=r"cannot be written .*: give another folder with --out"):
        EngineStore(bundle)


def test_leftovers_of_a_killed_build_are_cleared(bundle, tools) -> None:
    build(bundle, tools)
    folder = bundle / "engines"
    kept = {path.name for path in folder.iterdir()}
    for name in ("x.plan", "x.layers.json", "y.plan.partial"):
        (folder / name).write_bytes(b"?")
    (folder / "notes.txt").write_text("mine")
    (bundle / "manifest.json.partial").write_text("{")
    with EngineStore(bundle):
        pass
    assert {path.name for path in folder.iterdir()} == {*kept, "notes.txt"}
    assert not list(bundle.rglob("*.partial"))


def test_no_bundle(tmp_path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        EngineStore(tmp_path)


# --- another folder ---


def test_a_second_bundle_gets_the_engines(bundle, tools, tmp_path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    out = tmp_path / "out"
    clone_bundle(bundle, out)
    build(out, tools)
    check_whole(out, engines=6)
    assert (bundle / "manifest.json").read_bytes() == before
    assert not (bundle / "engines").exists()
    clone_bundle(bundle, out)  # a second run goes on in what is there
    check_whole(out, engines=6)


def test_engines_are_not_copied_along(bundle, tools, tmp_path) -> None:
    build(bundle, tools)
    clone_bundle(bundle, tmp_path / "out")
    check_whole(tmp_path / "out", engines=0)
    assert not (tmp_path / "out" / "engines").exists()


def test_a_destination_that_is_something_else(bundle, tmp_path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    clone_bundle(bundle, other)  # an empty folder is fine
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(OutputError, match="is there and is not a bundle"):
        clone_bundle(bundle, tmp_path / "full")
    assert (tmp_path / "full" / "file").read_text() == "mine"
    data = json.loads((other / "manifest.json").read_text())
    data["model"]["name"] = "another"
    (other / "manifest.json").unlink()
    (other / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(OutputError, match="is a bundle of other networks"):
        clone_bundle(bundle, other)
    (other / "manifest.json").write_text("{")
    with pytest.raises(OutputError, match="is there and is not whole"):
        clone_bundle(bundle, other)
    with pytest.raises(OutputError, match=r"out cannot be written: Not a directory"):
        clone_bundle(bundle, tmp_path / "full" / "file" / "out")


# --- killed ---


def run_until(folder: Path, seconds: float, number: signal.Signals) -> int:
    """Start a build of a bundle in a process of its own and send it a signal after some time."""
    with subprocess.Popen([sys.executable, str(SCRIPT), str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"building\n"
        time.sleep(seconds)
        process.send_signal(number)
        return process.wait(20)


def test_a_build_that_is_killed_anywhere_goes_on_and_ends(bundle, tools) -> None:
    randomness = random.Random(4)
    for _ in range(8):
        run_until(bundle, randomness.uniform(0, 1.0), signal.SIGKILL)
        check_whole(bundle)
    build(bundle, tools)
    check_whole(bundle, engines=6)
    assert not list(bundle.rglob("*.partial"))


def test_a_clone_that_is_killed_anywhere_is_whole_or_not_there(bundle, tmp_path) -> None:
    out = tmp_path / "clones" / "out"
    out.parent.mkdir()
    command = [sys.executable, "-c", CLONED, str(bundle), str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    runs = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(runs) > 20
    for killed, found, again, finished, beside in runs:
        assert killed == signal.SIGKILL
        assert found in ("nothing", "empty", "whole")
        assert (again, finished, beside) == (0, True, ["out"])
    assert {found for _, found, *_ in runs} >= {"nothing", "empty"}


def test_ctrl_c_ends_a_build_and_leaves_no_half_file(bundle) -> None:
    assert run_until(bundle, 0.4, signal.SIGINT) == 130
    check_whole(bundle)
    assert not list(bundle.rglob("*.partial"))
