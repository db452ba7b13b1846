# SPDX-License-Identifier: Apache-2.0
"""The shape of the code: who may import whom, and how large things may get, read from the source itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"ltxrt": "runtime", "ltxrt_kernels": "kernels", "ltxrt_export": "export"}
TRACERS = {"torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "ml_dtypes"}
#: What each package must never import, at any depth of any function.
FORBIDDEN = {
    "ltxrt": {"ltxrt_export", *TRACERS},
    "ltxrt_kernels": {"ltxrt", "ltxrt_export", *TRACERS},
    "ltxrt_export": set[str](),
}
#: Modules at the bottom, and what of the package they may stand on.
LEAVES = {"errors": set[str](), "shapes": {"errors"}, "preset": {"errors"}}
#: Layers of the runtime, highest first; a module, or a folder of them, imports from its own layer or from below.
LAYERS = (
    {"__main__", "cli", "cli_bench", "cli_process", "cli_progress", "cli_report", "doctor", "inspection"},
    {"serve"},
    {"testing"},
    {"pipeline"},
    {"result", "plan"},
    {"engine_store", "denoise", "encoders", "upsample", "decode"},
)

#: Files that may catch ``Exception``, and why.
BROAD_EXCEPTS = {"runtime/ltxrt/tokenizer.py": "the tokenizers library raises nothing narrower"}

MAX_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 6


def sources(package: str) -> list[Path]:
    """The package's modules."""
    return sorted((ROOT / PACKAGES[package] / package).rglob("*.py"))


ALL_SOURCES = [path for package in PACKAGES for path in sources(package)]


def module_of(path: Path) -> str:
    """``runtime/ltxrt/cli.py`` as ``ltxrt.cli``."""
    parts = path.relative_to(ROOT).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Absolute names of everything that a module imports, wherever in the file; for ``from a import b`` both."""
    inside = module_of(path).split(".")
    package = inside if path.name == "__init__.py" else inside[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module.split(".") if node.module else [])])
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def within(path: Path) -> set[str]:
    """Names of the ``ltxrt`` modules that one of them imports."""
    known = {module_of(source).removeprefix("ltxrt.") for source in sources("ltxrt")}
    return {name.removeprefix("ltxrt.") for name in imports(path) if name.startswith("ltxrt.")} & known


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_one_way(package):
    assert sources(package)
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imports(path)
        if name.split(".")[0] in FORBIDDEN[package]
    }
    assert not wrong


def test_the_exporter_does_import_torch():
    # Were this false, the test above would look for the wrong name.
    assert any("torch" in imports(path) for path in sources("ltxrt_export"))


def test_nothing_outside_the_exporter_the_tests_and_the_benchmarks_imports_torch():
    elsewhere = [
        path
        for path in ROOT.rglob("*.py")
        if not path.is_relative_to(ROOT / "export")
        and not path.is_relative_to(ROOT / "benchmarks")  # they time torch beside ltxrt
        and not path.is_relative_to(ROOT / "tests")
        and not any(part.startswith((".", "build", "dist")) for part in path.relative_to(ROOT).parts)
    ]
    assert len(elsewhere) > 30
    assert not [path for path in elsewhere if any(name.split(".")[0] == "torch" for name in imports(path))]


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves(leaf):
    assert within(ROOT / "runtime" / "ltxrt" / f"{leaf}.py") <= LEAVES[leaf]


@pytest.mark.parametrize("path", sources("ltxrt"), ids=module_of)
def test_layers_of_the_runtime(path):
    name = module_of(path).removeprefix("ltxrt.").split(".")[0]
    if name == "ltxrt":
        return  # the public names, which come from everywhere
    depth = next((index for index, layer in enumerate(LAYERS) if name in layer), len(LAYERS))
    above = set[str]().union(*LAYERS[:depth])
    assert not {other.split(".")[0] for other in within(path)} & above


def test_only_the_server_knows_of_the_web():
    web = {"fastapi", "starlette", "uvicorn", "prometheus_client"}
    users = {module_of(path) for path in sources("ltxrt") if {name.split(".")[0] for name in imports(path)} & web}
    assert all(user.startswith("ltxrt.serve.") for user in users)
    # A worker process has no use for it, and starts faster without.
    names = ("job", "store", "clip_job", "worker", "ray_replica", "sandbox_child", "sandbox_parent")
    lean = {f"ltxrt.serve.{name}" for name in names}
    assert not users & lean


@pytest.mark.parametrize(("extra", "module"), [("ray", "ray_pool"), ("redis", "store_redis")])
def test_only_one_module_knows_of_an_extra(extra, module):
    users = {module_of(path) for path in sources("ltxrt") if extra in {name.split(".")[0] for name in imports(path)}}
    assert users == {f"ltxrt.serve.{module}"}


def test_everything_in_the_runtime_imports_without_the_exporter_s_needs():
    modules = [module_of(path) for path in (*sources("ltxrt"), *sources("ltxrt_kernels"))]
    script = f"""
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {TRACERS | {"ltxrt_export"}!r}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocked())
try:
    import torch
except ImportError as error:
    assert str(error) == "blocked: torch"
else:
    raise AssertionError("the block does not block")
for name in {[module for module in modules if not module.endswith("__main__")]!r}:
    importlib.import_module(name)
"""
    ran = subprocess.run(
        [sys.executable, "-c", "import importlib\n" + script], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


# --- sizes ---


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A command of a command line has a parameter for every flag."""
    return any("command" in ast.unparse(decorator) for decorator in function.decorator_list)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    every = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def test_no_file_is_too_long():
    lines = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in ALL_SOURCES}
    assert not {name: count for name, count in lines.items() if count > MAX_LINES}


def test_no_function_is_too_long():
    long = [
        f"{path.relative_to(ROOT)}: {function.name}"
        for path in ALL_SOURCES
        for function in functions(path)
        if (function.end_lineno or 0) - function.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long


def test_no_function_takes_too_much():
    many = [
        f"{path.relative_to(ROOT)}: {function.name}"
        for path in ALL_SOURCES
        for function in functions(path)
        if len(parameters(function)) > MAX_PARAMETERS and not is_command(function)
    ]
    assert not many


def swallows_everything(handler: ast.ExceptHandler) -> bool:
    """Whether a handler takes every exception and does not end by raising the same one again."""
    last = handler.body[-1]
    if isinstance(last, ast.Raise) and last.exc is None:
        return False
    names = {part.id for part in ast.walk(handler.type or handler) if isinstance(part, ast.Name)}
    return handler.type is None or bool(names & {"Exception", "BaseException"})


def test_no_except_is_broad():
    found = {
        str(path.relative_to(ROOT))
        for path in ALL_SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ExceptHandler) and swallows_everything(node)
    }
    assert found == set(BROAD_EXCEPTS)


def test_every_file_names_its_licence_and_its_purpose():
    for path in ALL_SOURCES:
        text = path.read_text("utf-8")
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), path
        tree = ast.parse(text)
        assert not tree.body or ast.get_docstring(tree), path


def test_exports_are_sorted_and_there():
    for path in ALL_SOURCES:
        tree = ast.parse(path.read_text("utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names = ast.literal_eval(node.value)
                # Constants, then classes, then functions, each by name: the order that ruff keeps.
                assert names == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name)), path
