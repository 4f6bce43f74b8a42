"""The rules that keep the code base one can read: who may import whom, and what an import may cost."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A package may import itself, what stands beside everything, and what is listed for it here.
BESIDE = {"pangu", "pangu.errors", "pangu.files"}
ALLOWED = {
    "pangu_kernels": set(),
    "pangu.errors": set(),
    "pangu.files": set(),
    "pangu.config": set(),
    "pangu.device": {"pangu.config", "pangu_kernels"},
    "pangu.model": {"pangu.config", "pangu_kernels"},
    "pangu.tokenizer": {"pangu.config", "pangu.data"},
    "pangu.data": {"pangu.config", "pangu.tokenizer", "pangu_kernels"},
    "pangu.convert": {"pangu.config", "pangu.model", "pangu.tokenizer"},
    "pangu.parallel": {"pangu.config", "pangu.data", "pangu.device", "pangu.model", "pangu_kernels"},
    "pangu.doctor": {
        "pangu.config",
        "pangu.data",
        "pangu.device",
        "pangu.model",
        "pangu.parallel",
        "pangu.plan",
        "pangu.train",
        "pangu_kernels",
    },
    "pangu.launch": set(),
    "pangu.plan": {
        "pangu.config",
        "pangu.data",
        "pangu.device",
        "pangu.model",
        "pangu.parallel",
        "pangu.train",
        "pangu_kernels",
    },
    "pangu.train": {
        "pangu.config",
        "pangu.convert",
        "pangu.data",
        "pangu.device",
        "pangu.model",
        "pangu.parallel",
        "pangu.tokenizer",
        "pangu_kernels",
    },
}
TOP = {"pangu.cli", "pangu.__main__"}


def package(module: str) -> str:
    """`pangu.model.norm` -> `pangu.model`; `pangu_kernels.rope` -> `pangu_kernels`."""
    parts = module.split(".")
    return parts[0] if parts[0] == "pangu_kernels" else ".".join(parts[:2])


def modules() -> Iterator[tuple[str, Path]]:
    for base in (ROOT, ROOT / "kernels"):
        for path in sorted(base.glob("pangu*/**/*.py")):
            yield ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"), path


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            if node.module == "pangu":
                yield from (f"pangu.{alias.name}" if alias.name != "__version__" else "pangu" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize(("module", "path"), [pytest.param(*item, id=item[0]) for item in modules()])
def test_imports_point_downwards(module: str, path: Path) -> None:
    if module in TOP or module == "pangu":
        return
    ours = [name for name in imports(path) if name.split(".")[0] in ("pangu", "pangu_kernels")]
    beside = set() if package(module) == "pangu_kernels" else BESIDE
    allowed = ALLOWED[package(module)] | beside | {package(module)}
    wrong = sorted({name for name in ours if package(name) not in allowed})
    assert not wrong, f"{module} must not import {wrong}"


def test_kernels_import_only_torch() -> None:
    for module, path in modules():
        if module.startswith("pangu_kernels"):
            foreign = {name.split(".")[0] for name in imports(path)} - {"torch", "pangu_kernels", "triton", "torch_npu"}
            assert foreign <= set(sys.stdlib_module_names), f"{module} imports {foreign}"


def test_the_command_line_starts_without_heavy_imports() -> None:
    heavy = ("torch", "transformers", "matplotlib", "sentencepiece", "torch_npu")
    code = f"import sys, pangu.cli; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_no_machine_path_is_tracked() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        text = (ROOT / name).read_text(encoding="utf-8", errors="ignore")
        assert str(ROOT) + "/" not in text, f"{name} names a path of this machine"
