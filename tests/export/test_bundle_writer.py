# SPDX-License-Identifier: Apache-2.0
"""Writing bundles: all of it or nothing, the same bytes for the same input, and never over somebody's files."""

import errno
import hashlib
import json
import resource
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from safetensors.numpy import save_file

from ltxrt.bundle import Bundle, file_sha256
from ltxrt.errors import ExportError, OutputError
from ltxrt.manifest import NETWORK_NAMES, Manifest, ModelEntry, StateEntry, StreamEntry
from ltxrt.preset import PRESET_NAMES
from ltxrt_export.bundle_writer import BundleWriter
from ltxrt_export.networks.spec import Axis, NetworkSpec, Port
from ltxrt_export.onnx_export import Location, attach_weights, beside
from ltxrt_export.quantize.calibration import Calibration, Origin
from ltxrt_export.weights import TensorFile

MODEL = ModelEntry(
    name="toy",
    version="2.3.0",
    checkpoint_sha256="0" * 64,
    semantics="R3",
    licence="none",
    context_tokens=4,
    latent_channels=3,
    image_crf=0,
    auto_pixels=None,
    rope_max_position=(20.0, 2048.0, 2048.0),
    stream=StreamEntry(states=(StateEntry(name="s", channels=1, spatial_scale=1),), first_chunk_latents=1),
)
TABLES = {
    "rope_video": np.arange(3, dtype=np.float32),
    "rope_cross": np.arange(2, dtype=np.float32),
    "sigmas_stage_1": np.array([1.0, 0.0]),
    "sigmas_stage_2": np.array([0.5, 0.0]),
}


def weight_file(path: Path, value: float = 1.0) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file({"w": np.full(3, value, np.float32)}, path)
    return path


def network(name: str, weights: Path) -> NetworkSpec:
    """x + w."""
    return NetworkSpec(
        name=name,
        module=torch.nn.Identity(),
        inputs=(Port("x", "float32", ("n", 3)),),
        outputs=(Port("y", "float32", ("n", 3)),),
        axes={"n": Axis(1, 9, 2)},
        weights=TensorFile.open(weights).tensors,
    )


def graph_of(spec: NetworkSpec, location: Location = beside) -> ModelProto:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in "xy"]
    weight = helper.make_tensor_value_info("w", TensorProto.FLOAT, [3])
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], spec.name, [ports[0], weight], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    attach_weights(model, spec.weights, location)
    return model


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return weight_file(tmp_path / "source" / "toy.safetensors")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder in which nothing but the bundle may be at the end."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def add_all(writer: BundleWriter, weights: Path) -> dict[str, str]:
    """Everything but the manifest; network name to key."""
    keys: dict[str, str] = {}
    for name in NETWORK_NAMES:
        spec = network(name, weights)
        keys[name] = writer.add_network(spec, graph_of(spec, writer.location), "fp32")
    tokenizer = weights.with_name("tokenizer.json")
    tokenizer.write_text("{}")
    writer.add_tokenizer(tokenizer)
    writer.add_tables(TABLES)
    return keys


def write(destination: Path, weights: Path, *, overwrite: bool = False) -> Manifest:
    with BundleWriter(destination, overwrite=overwrite) as writer:
        keys = add_all(writer, weights)
        return writer.commit(MODEL, dict.fromkeys(PRESET_NAMES, keys), {"torch": "1", "onnx": "2"})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_committed_bundle_opens_and_every_file_is_hashed(out: Path, weights: Path) -> None:
    manifest = write(out / "bundle", weights)
    assert [path.name for path in out.iterdir()] == ["bundle"]
    bundle = Bundle.open(out / "bundle", verify=True)
    assert bundle.manifest == manifest
    files = contents(out / "bundle")
    assert set(files) == {*manifest.files, "manifest.json"}
    for name, entry in manifest.files.items():
        assert (entry.sha256, entry.bytes) == (hashlib.sha256(files[name]).hexdigest(), len(files[name]))
    entry = bundle.network("high", "denoiser")
    assert entry.weights == ("networks/toy.safetensors",)
    assert entry.shape_range == {"n": (1, 9)}
    assert [(port.name, port.dtype, port.shape) for port in entry.inputs] == [("x", "float32", ("n", 3))]
    assert set(manifest.networks) == {f"{Path(n.file).stem}" for n in manifest.networks.values()}


def test_equal_input_gives_equal_bytes(out: Path, weights: Path) -> None:
    write(out / "one", weights)
    with BundleWriter(out / "two") as writer:
        keys = add_all(writer, weights)
        writer.add_tables(dict(reversed(TABLES.items())))
        presets = {name: dict(reversed(keys.items())) for name in PRESET_NAMES}
        writer.commit(MODEL, presets, {"onnx": "2", "torch": "1"})
    one, two = contents(out / "one"), contents(out / "two")
    manifest = json.loads(one.pop("manifest.json")), json.loads(two.pop("manifest.json"))
    assert one == two
    assert manifest[0] == manifest[1]


def test_tables_keep_values_and_dtypes(out: Path, weights: Path) -> None:
    write(out / "bundle", weights)
    with np.load(out / "bundle" / "tables.npz") as archive:
        assert archive.files == sorted(TABLES)
        for name, value in TABLES.items():
            assert archive[name].dtype == value.dtype
            np.testing.assert_array_equal(archive[name], value)


def test_key_names_graph_weights_and_precision(out: Path, tmp_path: Path) -> None:
    one, other = (weight_file(tmp_path / folder / "w.safetensors", value) for folder, value in (("a", 1), ("b", 2)))
    with BundleWriter(out / "bundle") as writer:
        spec = network("denoiser", one)
        keys = [writer.add_network(spec, graph_of(spec, writer.location), "fp32") for _ in range(2)]
        assert keys[0] == keys[1]
        keys.append(writer.add_network(spec, graph_of(spec, writer.location), "fp16"))
        renamed = graph_of(spec, writer.location)
        renamed.graph.name = "other"
        keys.append(writer.add_network(spec, renamed, "fp32"))
        assert len({key.rsplit("-", 1)[1] for key in keys}) == 2
    with BundleWriter(out / "bundle") as writer:
        spec = network("denoiser", other)
        keys.append(writer.add_network(spec, graph_of(spec, writer.location), "fp32"))
    assert len(set(keys)) == 4
    assert all(key.startswith("denoiser-fp") and len(key.rsplit("-", 1)[1]) == 12 for key in keys)


def test_weight_files_are_read_once(out: Path, weights: Path) -> None:
    expected = file_sha256(weights)
    with BundleWriter(out / "bundle") as writer:
        keys = add_all(writer, weights)
        weights.unlink()
        assert writer.sha256(weights) == expected
        # Not when the manifest is made either.
        manifest = writer.commit(MODEL, dict.fromkeys(PRESET_NAMES, keys), {})
    assert manifest.files["networks/toy.safetensors"].sha256 == expected


def test_weights_that_are_made_in_the_bundle_stay_where_they_are(out: Path) -> None:
    with BundleWriter(out / "bundle") as writer:
        made = weight_file(writer.weights_folder / "denoiser-fp8-0123456789ab.safetensors")
        before = made.stat().st_ino
        spec = network("denoiser", made)
        key = writer.add_network(spec, graph_of(spec, writer.location), "fp8")
        assert (made.stat().st_ino, writer.path_of(key).parent) == (before, made.parent)
        assert {path.name for path in made.parent.iterdir()} == {made.name, f"{key}.onnx"}
        # What is there needs no more room.
        assert writer.plan_weights([], 10**6).made_bytes == 10**6 - made.stat().st_size


def test_finished_fp8_weights_of_a_killed_run_are_used(out: Path, weights: Path) -> None:
    left = out / ".bundle.export-partial" / "networks"
    left.mkdir(parents=True)
    for name in ("denoiser-fp8-0123456789ab.safetensors", "denoiser-fp8-ffffffffffff.safetensors"):
        weight_file(left / name)
    for name in ("denoiser-fp8-0123456789ab.safetensors.partial", "toy.safetensors", "denoiser-fp8-0123456789ab.onnx"):
        (left / name).write_text("cut off")
    with BundleWriter(out / "bundle") as writer:
        assert sorted(path.name[13:] for path in writer.weights_folder.iterdir()) == [
            "0123456789ab.safetensors",
            "ffffffffffff.safetensors",
        ]
        keys = add_all(writer, weights)
        spec = network("denoiser", left / "denoiser-fp8-0123456789ab.safetensors")
        keys["denoiser"] = writer.add_network(spec, graph_of(spec, writer.location), "fp8")
        manifest = writer.commit(MODEL, {"low": keys}, {})
    # Taken over, but for what no network needs.
    assert [name for name in manifest.files if "fp8-" in name and name.endswith(".safetensors")] == [
        "networks/denoiser-fp8-0123456789ab.safetensors"
    ]
    assert Bundle.open(out / "bundle", verify=True).manifest == manifest


def test_what_no_preset_names_is_not_in_the_bundle(out: Path, weights: Path, tmp_path: Path) -> None:
    with BundleWriter(out / "bundle") as writer:
        keys = add_all(writer, weights)
        spec = network("denoiser", weight_file(tmp_path / "other" / "other.safetensors", 2.0))
        other = writer.add_network(spec, graph_of(spec, writer.location), "fp16")
        manifest = writer.commit(MODEL, {"low": keys, "high": {**keys, "denoiser": other}, "medium": keys}, {})
        assert len(manifest.networks) == len(NETWORK_NAMES) + 1
    with BundleWriter(out / "bundle", overwrite=True) as writer:
        keys = add_all(writer, weights)
        writer.add_network(spec, graph_of(spec, writer.location), "fp16")
        manifest = writer.commit(MODEL, {"low": keys}, {})
    assert set(manifest.networks) == set(keys.values())
    assert {path.name for path in (out / "bundle" / "networks").iterdir()} == {
        "toy.safetensors",
        *(f"{key}.onnx" for key in keys.values()),
    }


def test_a_draft_opens_and_leaves_no_trace(out: Path, weights: Path) -> None:
    with BundleWriter(out / "drafted") as writer:
        keys = add_all(writer, weights)
        draft = writer.draft(MODEL, {"high": keys})
        assert draft.network("high", "upsampler").precision == "fp32"
        assert draft.file("tokenizer.json").read_text() == "{}"
        assert not (out / "drafted").exists()
        writer.commit(MODEL, dict.fromkeys(PRESET_NAMES, keys), {"torch": "1", "onnx": "2"})
    write(out / "straight", weights)
    assert contents(out / "drafted") == contents(out / "straight")


def test_a_calibration_is_kept(out: Path, weights: Path) -> None:
    origin = Origin(
        model="m", checkpoint_sha256="0" * 64, semantics="R3", stage_1_sigmas=(), stage_2_sigmas=(), clips=()
    )
    calibration = Calibration(made_from=origin, networks={})
    with BundleWriter(out / "bundle") as writer:
        keys = add_all(writer, weights)
        writer.add_calibration(calibration)
        writer.commit(MODEL, {"high": keys}, {})
    assert "calibration.json" in Bundle.open(out / "bundle", verify=True).manifest.files
    assert Calibration.load(out / "bundle" / "calibration.json") == calibration


def test_two_weight_files_of_one_name(out: Path, tmp_path: Path) -> None:
    files = [weight_file(tmp_path / folder / "w.safetensors", len(folder)) for folder in ("a", "bb")]
    with BundleWriter(out / "bundle") as writer:
        assert [writer.location(path) for path in (*files, *files)] == ["w.safetensors", "bb-w.safetensors"] * 2
        for name, path in zip(("denoiser", "upsampler"), files, strict=True):
            spec = network(name, path)
            key = writer.add_network(spec, graph_of(spec, writer.location), "fp32")
            beside = writer.path_of(key).with_name(writer.location(path))
            assert beside.read_bytes() == path.read_bytes()
        nested = tmp_path / "c" / "bb" / "w.safetensors"
        with pytest.raises(ExportError, match=r"c/bb/w\.safetensors: another weight file of that name"):
            writer.location(nested)


def interrupt(destination: Path, weights: Path, stage: str, *others: Path) -> None:
    """Stop after some of the work, while others write ``others``."""
    with BundleWriter(destination) as writer:
        assert any(destination.parent.iterdir())
        if stage == "network":
            spec = network("denoiser", weights)
            writer.add_network(spec, graph_of(spec, writer.location), "fp32")
        if stage == "all":
            add_all(writer, weights)
        for other in others:
            other.write_text("theirs")
        raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["nothing", "network", "all"])
@pytest.mark.parametrize("above", [".", "new", "new/deep"])
def test_nothing_is_left_after_an_error(out: Path, weights: Path, stage: str, above: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt(out / above / "bundle", weights, stage)
    assert not any(out.iterdir())


def test_folders_that_others_use_meanwhile_stay(out: Path, weights: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt(out / "new" / "deep" / "bundle", weights, "network", out / "new" / "theirs")
    assert [path.name for path in out.rglob("*")] == ["new", "theirs"]


def test_folders_above_are_made(out: Path, weights: Path) -> None:
    write(out / "new" / "deep" / "bundle", weights)
    assert [path.name for path in (out / "new" / "deep").iterdir()] == ["bundle"]


def test_without_commit_there_is_no_bundle(out: Path, weights: Path) -> None:
    with BundleWriter(out / "bundle") as writer:
        add_all(writer, weights)
    writer.close()
    assert not any(out.iterdir())


def check_refused(destination: Path, match: str, *, overwrite: bool) -> None:
    folder = destination.parent
    before = sorted(folder.rglob("*"))
    with pytest.raises(OutputError, match=match) as caught:
        BundleWriter(destination, overwrite=overwrite)
    assert "\n" not in str(caught.value)
    assert str(destination) in str(caught.value)
    assert sorted(folder.rglob("*")) == before


def test_an_existing_folder_is_refused(out: Path, weights: Path) -> None:
    write(out / "bundle", weights)
    (out / "empty").mkdir()
    (out / "file").write_text("x")
    (out / "dangling").symlink_to("nowhere")
    for name in ("bundle", "empty", "file", "dangling"):
        check_refused(out / name, "exists already; choose another folder, or --overwrite", overwrite=False)


def test_what_is_no_bundle_is_never_overwritten(out: Path, weights: Path) -> None:
    write(out / "bundle", weights)
    (out / "photos").mkdir()
    (out / "photos" / "one.jpg").write_text("x")
    (out / "file").write_text("x")
    (out / "dangling").symlink_to("nowhere")
    (out / "link").symlink_to("bundle")
    for name in ("photos", "file", "dangling", "link"):
        check_refused(out / name, "is not a bundle, so it is not overwritten", overwrite=True)


def test_overwrite_replaces_the_whole_bundle(out: Path, weights: Path, tmp_path: Path) -> None:
    write(out / "bundle", weights)
    (out / "bundle" / "stray").write_text("x")
    write(out / "bundle", weight_file(tmp_path / "other" / "other.safetensors", 2.0), overwrite=True)
    assert [path.name for path in out.iterdir()] == ["bundle"]
    manifest = Bundle.open(out / "bundle", verify=True).manifest
    assert set(contents(out / "bundle")) == {*manifest.files, "manifest.json"}
    assert "networks/other.safetensors" in manifest.files


def test_an_empty_folder_may_be_overwritten(out: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "empty").mkdir()
    monkeypatch.chdir(out)
    write(Path("empty"), weights, overwrite=True)
    assert Bundle.open(out / "empty").manifest.model == MODEL


def test_the_root_folder_is_no_place() -> None:
    with pytest.raises(OutputError, match=r"^/: "):
        BundleWriter(Path("/"), overwrite=True)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_swap_keeps_the_old_bundle(
    out: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    write(out / "bundle", weights)
    before = contents(out)
    rename, calls = Path.rename, list[Path]()

    def failing_rename(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(OutputError, match=r"bundle: cannot be written \(Input/output error\)"):
        write(out / "bundle", weights, overwrite=True)
    assert contents(out) == before


@contextmanager
def files_of_at_most(size_bytes: int) -> Generator[None]:
    """A disk on which longer files cannot be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


#: Longest file that fits, and what does not then. Weight files need no room where they are shared.
LIMITS: Mapping[int, str] = {
    100: r"networks/text_encoder-fp32-\w+\.onnx",
    500: r"tables\.npz",
    2000: r"manifest\.json",
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_disk_error_is_one_line_and_leaves_nothing(out: Path, weights: Path, limit: int) -> None:
    weights.with_name("tokenizer.json").write_text("{}")
    with files_of_at_most(limit), pytest.raises(OutputError) as caught:
        write(out / "new" / "bundle", weights)
    assert caught.match(rf"out/new/bundle/{LIMITS[limit]}: cannot be written \(File too large\)$")
    assert not any(out.iterdir())


@pytest.mark.parametrize("destination", ["file/bundle", "file/new/bundle", "x" * 250])
def test_a_folder_that_cannot_be_made_is_refused(out: Path, destination: str) -> None:
    (out / "file").write_text("")
    check_refused(out / destination, r"cannot be written \((Not a directory|File name too long)\)", overwrite=False)


def write_changed(destination: Path, weights: Path, change: Callable[[ModelProto], object]) -> None:
    """A bundle's first network, changed before it is added."""
    spec = network("denoiser", weights)
    with BundleWriter(destination) as writer:
        model = graph_of(spec, writer.location)
        change(model)
        writer.add_network(spec, model, "fp32")


def test_a_source_that_is_gone(out: Path, weights: Path) -> None:
    with pytest.raises(ExportError, match=r"toy\.safetensors: cannot be read: No such file"):
        write_changed(out / "bundle", weights, lambda model: weights.unlink())
    assert not any(out.iterdir())


def test_an_invalid_graph_leaves_nothing(out: Path, weights: Path) -> None:
    with pytest.raises(ExportError, match=r"^denoiser: not a valid graph: .*Plus"):
        write_changed(out / "bundle", weights, lambda model: setattr(model.graph.node[0], "op_type", "Plus"))
    assert not any(out.iterdir())
