# SPDX-License-Identifier: Apache-2.0
"""The linter on whole bundles, its rules as a table, and the command."""

import json
import os
import re
import shutil
from pathlib import Path

import onnx
import pytest
import typer
from onnx import helper
from typer.testing import CliRunner

from ltxrt.bundle import Bundle, file_sha256, tiny_bundle_path
from ltxrt.errors import BundleError, ExportError, RequestError
from ltxrt_export.engines.buckets import load_buckets
from ltxrt_export.engines.profiles import network_profiles
from ltxrt_export.lint import cli
from ltxrt_export.lint.findings import RULES, Finding, finding
from ltxrt_export.lint.linter import lint_bundle, lint_network, sizes_to_check

BUCKETS = load_buckets()
SOURCES = Path(cli.__file__).parent


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A copy of the tiny bundle whose graphs may be changed."""

    def link(source: str, target: str) -> str:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
        return target

    return Path(shutil.copytree(tiny_bundle_path(), tmp_path / "bundle", copy_function=link))


def change(folder: Path, network: str, edit) -> None:
    """Change a graph of a bundle, and the manifest with it."""
    data = json.loads((folder / "manifest.json").read_text())
    name = data["networks"][data["presets"]["high"][network]]["file"]
    model = onnx.load(folder / name, load_external_data=False)
    edit(model)
    (folder / name).unlink()
    (folder / name).write_bytes(model.SerializeToString())
    data["files"][name] = {"sha256": file_sha256(folder / name), "bytes": (folder / name).stat().st_size}
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps(data))


# --- the shipped bundle ---


def test_the_tiny_bundle_has_no_errors() -> None:
    found = list(lint_bundle(tiny_bundle_path(), BUCKETS))
    assert [str(entry) for entry in found if entry.severity == "error"] == []
    # What it has is known: fp32 attention, the Fourier basis, integer inputs, empty tensors of the streaming decoder.
    assert {entry.rule for entry in found} <= {"attention-unfused", "folded-kernel", "int64", "empty-input"}


def test_every_size_of_the_tiny_bundle_is_followed() -> None:
    manifest = Bundle.open().manifest
    for key in manifest.presets["high"].values():
        rules = {entry.rule for entry in lint_network(tiny_bundle_path(), manifest, key, BUCKETS)}
        assert not rules & {"shape-unknown", "inconsistent", "data-dependent"}


def test_a_fault_in_one_graph_is_found_there(bundle) -> None:
    def edit(model) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Attention")
        node.attribute.append(helper.make_attribute("softmax_precision", 1))

    change(bundle, "denoiser", edit)
    (found,) = (entry for entry in lint_bundle(bundle, BUCKETS) if entry.severity == "error")
    assert found.network.startswith("denoiser")
    assert (found.rule, found.message) == ("attention-attribute", "softmax_precision is given")
    assert re.search(r"attention \(Attention\)", found.node)


def test_a_weight_outside_of_its_file_is_found(bundle) -> None:
    def edit(model) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        next(entry for entry in tensor.external_data if entry.key == "offset").value = str(10**9)

    change(bundle, "upsampler", edit)
    assert "external-range" in {entry.rule for entry in lint_bundle(bundle, BUCKETS)}


def test_presets_choose_networks(bundle) -> None:
    everything = list(lint_bundle(bundle, BUCKETS))
    assert list(lint_bundle(bundle, BUCKETS, ["high"])) == everything  # the tiny presets share all networks
    with pytest.raises(RequestError, match="'ultra' is not allowed"):
        list(lint_bundle(bundle, BUCKETS, ["ultra"]))


def test_no_bundle(tmp_path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        list(lint_bundle(tmp_path, BUCKETS))


def test_sizes_that_another_one_exceeds_are_left_out() -> None:
    manifest = Bundle.open().manifest
    for key in manifest.presets["high"].values():
        profiles = network_profiles(manifest, key, BUCKETS)
        kept = sizes_to_check(profiles)
        for profile in profiles:
            for corner in profile.corners:
                assert any(
                    all(sizes[s] >= size and (sizes[s] == 0) == (size == 0) for s, size in corner.items())
                    for sizes in kept
                )
        assert len(kept) <= 16


# --- rules as data ---


def test_every_rule_is_used_and_every_rule_that_is_used_is_there() -> None:
    text = "\n".join(path.read_text("utf-8") for path in SOURCES.glob("*.py") if path.name != "findings.py")
    used = set(re.findall(r'"([a-z0-9]+(?:-[a-z0-9]+)*)"', text)) & RULES.keys()
    assert used == RULES.keys()
    for name in re.findall(r'finding\(\s*view\.network,\s*[^,]+,\s*"([a-z0-9-]+)"', text):
        assert name in RULES


def test_a_finding_as_a_line_and_as_data() -> None:
    node = helper.make_node("Add", ["a", "b"], ["c"], name="n")
    found = finding("net", node, "rank", "c has rank 9")
    assert str(found) == f"error: net: n (Add): c has rank 9 [rank: {RULES['rank'].reason}]"
    assert found.to_json() == {
        "network": "net",
        "node": "n (Add)",
        "rule": "rank",
        "severity": "error",
        "message": "c has rank 9",
        "reason": RULES["rank"].reason,
    }
    node.name = ""
    assert finding("net", node, "rank", "").node == "-> c (Add)"


# --- the command ---


@pytest.fixture
def run():
    parent = typer.Typer()
    parent.callback()(lambda: None)
    parent.add_typer(cli.app)

    def invoke(*arguments):
        return CliRunner().invoke(parent, ["lint", *map(str, arguments)])

    return invoke


def test_the_command_on_a_clean_bundle(run) -> None:
    result = run(tiny_bundle_path())
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].startswith("warning: denoiser")
    assert "attention-unfused x " in result.stdout


def test_the_command_on_a_bundle_with_errors(run, bundle) -> None:
    def edit(model) -> None:
        model.opset_import[0].version = 25

    change(bundle, "upsampler", edit)
    result = run(bundle)
    assert isinstance(result.exception, ExportError)
    assert result.exception.exit_code == 9
    assert "1 findings that keep TensorRT from building it" in str(result.exception)
    assert result.stdout.splitlines()[0].startswith("error: upsampler")


def test_warnings_count_where_asked_for(run) -> None:
    assert isinstance(run(tiny_bundle_path(), "--strict").exception, ExportError)


def test_findings_as_json(run) -> None:
    data = json.loads(run(tiny_bundle_path(), "--json", "--preset", "low").stdout)
    assert {entry["rule"] for entry in data["findings"]} <= RULES.keys()
    assert data["findings"][0].keys() == {"network", "node", "rule", "severity", "message", "reason"}


def test_many_findings_of_a_kind_are_one_line() -> None:
    found = [Finding("net", f"n{index}", "rank", "error", "m") for index in range(5)]
    (line,) = cli.summary(found)
    assert line == f"error: net: rank x 5: m; {RULES['rank'].reason} [n0, n1, n2 and 2 more]"
    assert cli.summary([]) == ["nothing found"]
