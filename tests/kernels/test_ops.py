# SPDX-License-Identifier: Apache-2.0
"""What holds for every op: its folder, its declaration, its reference and its inputs."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import ltxrt_kernels
from ltxrt_kernels.dtypes import FORMATS, STORAGE
from ltxrt_kernels.ops import OPS

FOLDER = Path(ltxrt_kernels.__file__).parent


def test_every_folder_with_a_kernel_is_an_op():
    assert {path.parent.name for path in FOLDER.glob("*/kernel.cu")} == set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_folder(name):
    assert {path.name for path in (FOLDER / name).iterdir() if path.is_file()} == {
        "__init__.py",
        "reference.py",
        "kernel.cu",
    }
    assert (
        f"\n{name}(" in (FOLDER / name / "kernel.cu").read_text()
        or f" {name}(" in (FOLDER / name / "kernel.cu").read_text()
    )
    assert (Path(__file__).parent / f"test_{name}.py").exists()
    module = import_module(f"ltxrt_kernels.{name}.reference")
    assert OPS[name].reference is module.reference
    assert OPS[name].generate_inputs is module.generate_inputs


@pytest.mark.parametrize("name", OPS)
def test_tests_and_production_launch_different_sizes(name):
    tests = import_tests(name)
    assert not set(tests) & set(OPS[name].production)
    assert {type(problem) for problem in tests} == {type(problem) for problem in OPS[name].production}
    assert all(problem.op == name for problem in (*tests, *OPS[name].production))


def import_tests(name):
    """``PROBLEMS`` of the op's test, without importing what else is in it."""
    import ast

    module = import_module(f"ltxrt_kernels.{name}")
    tree = ast.parse((Path(__file__).parent / f"test_{name}.py").read_text("utf-8"))
    (table,) = (
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PROBLEMS"
    )
    return eval(ast.unparse(table.value), vars(module))


@pytest.mark.parametrize("name", OPS)
def test_inputs_are_those_of_the_ports_and_reproducible(name):
    op, problem = OPS[name], import_tests(name)[0]
    first, second, other = (op.generate_inputs(problem, seed) for seed in (1, 1, 2))
    assert set(first) == {port.name for port in problem.inputs}
    for port in problem.inputs:
        assert first[port.name].shape == port.shape
        assert first[port.name].dtype == STORAGE[port.dtype]
        assert np.array_equal(first[port.name], second[port.name])
    assert any(not np.array_equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("name", OPS)
def test_reference_gives_the_outputs_in_float64(name):
    op, problem = OPS[name], import_tests(name)[0]
    outputs = op.reference(problem, op.generate_inputs(problem, 1))
    assert {key: (value.shape, value.dtype) for key, value in outputs.items()} == {
        port.name: (port.shape, np.float64) for port in problem.outputs
    }
    assert all(np.isfinite(value).all() for value in outputs.values())


@pytest.mark.parametrize("name", OPS)
def test_sixteen_bit_inputs_of_both_kinds_are_tried(name):
    problems = (*import_tests(name), *OPS[name].production)
    kinds = {port.dtype for problem in problems for port in problem.inputs}
    assert {"float16", "bfloat16", "float32"} <= kinds
    assert kinds <= {*FORMATS, "int64"}
