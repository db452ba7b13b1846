# SPDX-License-Identifier: Apache-2.0
"""Rules about weights in files beside the graph."""

import pytest
from onnx import TensorProto, helper

from ltxrt_export.lint.external import check_external_data
from ltxrt_export.lint.graph import GraphView

FLOAT, BF16, FP8 = TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN


@pytest.fixture
def found(tmp_path):
    """``found(location=..., offset=...)``: rules and messages of one weight in a file of 100 bytes."""
    (tmp_path / "weights.safetensors").write_bytes(bytes(100))

    def check(listed=None, dims=(2, 5), kind=FLOAT, **entries):
        tensor = TensorProto(name="w", data_type=kind, dims=dims)
        tensor.data_location = TensorProto.EXTERNAL
        given = {"location": "weights.safetensors", "offset": "60", "length": "40"} | entries
        for key, value in given.items():
            if value is not None:
                tensor.external_data.add(key=key, value=value)
        output = helper.make_empty_tensor_value_info("y")
        graph = helper.make_graph([helper.make_node("Relu", ["w"], ["y"])], "g", [], [output], [tensor])
        view = GraphView("net", helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), tmp_path)
        return [(entry.rule, entry.message) for entry in check_external_data(view, listed)]

    return check


def test_weights_that_are_fine(found) -> None:
    assert found() == []
    assert found(listed=frozenset({"weights.safetensors"})) == []
    assert found(offset=None) == []
    assert found(length=None) == []
    assert found(checksum="1234") == []
    assert found(kind=BF16, length="20", offset="80") == []
    assert found(kind=FP8, length="10") == []
    assert found(dims=(), length="4") == []
    assert found(dims=(0, 5), length="0") == []


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("/etc/weights", "it points to /etc/weights"),
        ("../weights", "it points to ../weights"),
        ("sub/weights", "it points to sub/weights"),
        ("..", "it points to .."),
        ("", "it points to no file"),
        (None, "it points to no file"),
        ("other.safetensors", "other.safetensors is not there"),
    ],
)
def test_places(found, location, message) -> None:
    assert found(location=location) == [("external-location", message)]


def test_a_symbolic_link(found, tmp_path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "weights.safetensors")
    assert found(location="link") == [("external-location", "link is a symbolic link")]


def test_a_folder(found, tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    assert found(location="folder") == [("external-location", "folder is not there")]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"length": "36"}, "[2, 5] takes 40 bytes, its length is 36"),
        ({"kind": BF16}, "[2, 5] takes 20 bytes, its length is 40"),
        ({"offset": "61"}, "it ends at byte 101, weights.safetensors has 100"),
        ({"offset": "-4"}, "its offset is -4"),
        ({"offset": "x"}, "offset or length is not a number"),
    ],
)
def test_ranges(found, entries, message) -> None:
    assert found(**entries) == [("external-range", message)]


def test_keys(found) -> None:
    assert found(basepath="/") == [("external-key", "it has the key basepath")]


def test_files_that_the_manifest_does_not_list(found) -> None:
    assert found(listed=frozenset({"a"})) == [("external-listed", "it points to weights.safetensors")]
