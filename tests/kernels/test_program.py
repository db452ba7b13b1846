# SPDX-License-Identifier: Apache-2.0
"""The key covers everything that reaches the compiler, and nothing else."""

from dataclasses import fields, replace

import pytest

from ltxrt_kernels import program as program_module
from ltxrt_kernels.euler_step import EulerStep
from ltxrt_kernels.ops import OPS
from ltxrt_kernels.program import ARCHITECTURES, CompilerIdentity, Program, architecture_for, program

COMPILER = CompilerIdentity("13.0 (13.0.88)", "ab" * 32)
PROGRAM = program(EulerStep(tokens=5), "sm_90a")
OTHER = {
    "entry": "other",
    "architecture": "sm_80",
    "source": PROGRAM.source + "\n",
    "includes": {"ltxrt.cuh": "// nothing"},
    "options": (*PROGRAM.options, "--use_fast_math"),
}


@pytest.mark.parametrize("field", [field.name for field in fields(Program)])
def test_every_field_changes_the_key(field):
    assert replace(PROGRAM, **{field: OTHER[field]}).key(COMPILER) != PROGRAM.key(COMPILER)


@pytest.mark.parametrize("field", [field.name for field in fields(CompilerIdentity)])
def test_the_compiler_changes_the_key(field):
    assert PROGRAM.key(replace(COMPILER, **{field: "another"})) != PROGRAM.key(COMPILER)


def test_the_schema_changes_the_key(monkeypatch):
    before = PROGRAM.key(COMPILER)
    monkeypatch.setattr(program_module, "KEY_SCHEMA", program_module.KEY_SCHEMA + 1)
    assert PROGRAM.key(COMPILER) != before


def test_sizes_that_are_not_compiled_in_do_not():
    assert program(EulerStep(tokens=9), "sm_90a").key(COMPILER) == PROGRAM.key(COMPILER)
    assert program(EulerStep(tokens=5, channels=64), "sm_90a").key(COMPILER) != PROGRAM.key(COMPILER)


def test_the_key_is_the_same_in_every_process():
    fixed = Program(entry="a", architecture="sm_80", source="b", includes={"c": "d"}, options=("e",))
    assert fixed.key(CompilerIdentity("f", "g")) == ("2744efcc4c05b72a404b5b38e175d6bf18ad10f5adb078e4ba9f12d5accd0231")


def test_options_are_sorted_and_without_paths():
    for op in OPS.values():
        options = program(op.production[0], "sm_80").options
        assert list(options[1:]) == sorted(options[1:])
        assert not any("include" in option for option in options)


def test_every_macro_of_a_source_is_defined_and_used():
    for op in OPS.values():
        source = program(op.production[0], "sm_80").source
        for name in op.production[0].launch().defines:
            assert name in source.split("#include", 1)[1], (op.name, name)


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
    ],
)
def test_architecture_of_a_gpu(capability, architecture):
    assert architecture_for(capability) == architecture


@pytest.mark.parametrize("capability", [(7, 5), (11, 0), (13, 0)])
def test_a_gpu_without_code_is_refused(capability):
    with pytest.raises(ValueError, match=r"compute capability: .* is not allowed"):
        architecture_for(capability)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="'sm_75' is not allowed; allowed: sm_80, sm_89"):
        program(EulerStep(tokens=5), "sm_75")
    assert len(ARCHITECTURES) == 5
