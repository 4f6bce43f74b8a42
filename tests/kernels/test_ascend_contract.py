"""Every call of a torch_npu operator in our sources fits the operator's schema in the release we pin.

The schemas are facts, kept in `ascend_schemas.json` so that this needs no torch_npu; where it is installed they are
compared with the real ones.
"""

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FACTS = json.loads((ROOT / "kernels/pangu_kernels/ascend_schemas.json").read_text(encoding="utf-8"))
LITERALS = {"str": (str,), "bool": (bool,), "int": (int,), "float": (float, int)}


@dataclass(frozen=True)
class Call:
    operator: str
    node: ast.Call
    targets: int | None
    """Names that the results are unpacked into, if they are and none is starred."""
    where: str


def test_every_call_fits_its_schema() -> None:
    calls = [call for path in sources() for call in operator_calls(path.read_text(encoding="utf-8"), path.name)]
    assert {call.operator for call in calls} == set(FACTS["schemas"]), "ascend_schemas.json lists what is called"
    problems = [f"{call.where}: {call.operator}: {problem}" for call in calls for problem in misfits(call)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("torch.ops.npu.npu_rms_norm(x)", "'gamma' is missing"),
        ("torch.ops.npu.npu_rms_norm(x, g, eps=1e-6)", "no argument 'eps'"),
        ("torch_npu.npu_rms_norm(x, g, 1e-6, None)", "takes 3 positional arguments, got 4"),
        ("torch_npu.npu_rms_norm(x, g, gamma=g)", "'gamma' is given twice"),
        ("torch_npu.npu_rms_norm(*tensors)", "arguments are not spelled out"),
        ("torch.ops.npu.npu_swiglu(x, 'last')", "'dim' is int, got 'last'"),
        ("y, rstd, z = torch.ops.npu.npu_rms_norm(x, g)", "has 2 results, unpacked into 3"),
        ("torch.ops.npu.npu_fusion_attention_grad(q, k, v, d, 1, 'TND', None)", "takes 6 positional arguments, got 7"),
        ("torch.ops.npu.npu_fusion_attention(q, k, v, 1, 'TND', pre_tokens=1)", "no argument 'pre_tokens'"),
        ("torch.ops.npu.npu_rms_norm(x, g, 1e-6)", None),
        ("(y, *rest) = torch.ops.npu.npu_fusion_attention(q, k, v, 1, 'TND', scale=1)", None),
    ],
)
def test_a_wrong_call_is_found(source: str, problem: str | None) -> None:
    (call,) = operator_calls(source, "example")
    assert list(misfits(call)) == ([] if problem is None else [problem])


def test_a_call_through_a_variable_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"example:1: call torch\.ops\.npu\.npu_rms_norm where it is named"):
        list(operator_calls("norm = torch.ops.npu.npu_rms_norm", "example"))


@pytest.mark.ascend
@pytest.mark.skipif(find_spec("torch_npu") is None, reason="torch_npu is not installed")
def test_the_schemas_are_those_of_the_installed_release() -> None:
    from pangu.device.cann_emulator import emulated_npu

    assert version("torch_npu").startswith(FACTS["torch_npu"])
    with emulated_npu():
        real = {name: str(torch._C._get_schema(f"npu::{name}", "")) for name in FACTS["schemas"]}
    assert real == FACTS["schemas"], json.dumps(real, indent=2)


def sources() -> Iterator[Path]:
    for folder in ("pangu", "kernels", "benchmarks"):
        yield from sorted((ROOT / folder).glob("**/*.py"))


def operator_calls(source: str, name: str) -> Iterator[Call]:
    tree = ast.parse(source)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    unpacked = {id(node.value): node.targets[0] for node in ast.walk(tree) if isinstance(node, ast.Assign)}
    for node in ast.walk(tree):
        operator = operator_of(node)
        if operator is None:
            continue
        where = f"{name}:{node.lineno}"
        assert id(node) in called, f"{where}: call {ast.unparse(node)} where it is named, so that this test sees how"
        call = called[id(node)]
        target = unpacked.get(id(call))
        names = target.elts if isinstance(target, ast.Tuple) else []
        starred = any(isinstance(element, ast.Starred) for element in names)
        yield Call(operator, call, None if starred or not names else len(names), where)


def operator_of(node: ast.AST) -> str | None:
    """`npu_x` for `torch.ops.npu.npu_x` and `torch_npu.npu_x`."""
    if not isinstance(node, ast.Attribute):
        return None
    owner = ast.unparse(node.value)
    return node.attr if owner == "torch.ops.npu" or (owner == "torch_npu" and node.attr.startswith("npu_")) else None


def misfits(call: Call) -> Iterator[str]:
    schema = torch._C.parse_schema(FACTS["schemas"][call.operator])
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    if any(isinstance(value, ast.Starred) for value in call.node.args) or any(
        k.arg is None for k in call.node.keywords
    ):
        yield "arguments are not spelled out"
        return
    if len(call.node.args) > len(positional):
        yield f"takes {len(positional)} positional arguments, got {len(call.node.args)}"
        return
    given = {argument.name: value for argument, value in zip(positional, call.node.args, strict=False)}
    for keyword in call.node.keywords:
        assert keyword.arg is not None
        if keyword.arg in given:
            yield f"{keyword.arg!r} is given twice"
        given[keyword.arg] = keyword.value
    arguments = {argument.name: argument for argument in schema.arguments}
    for name, value in given.items():
        if name not in arguments:
            yield f"no argument {name!r}"
        elif isinstance(value, ast.Constant) and value.value is not None:
            wanted = str(arguments[name].type).removeprefix("Optional[").removesuffix("]")
            if not isinstance(value.value, LITERALS.get(wanted, ())):
                yield f"{name!r} is {wanted}, got {value.value!r}"
    for name, argument in arguments.items():
        if name not in given and not argument.has_default_value():
            yield f"{name!r} is missing"
    if call.targets is not None and call.targets != len(schema.returns):
        yield f"has {len(schema.returns)} results, unpacked into {call.targets}"
