"""Which experts classes transformers has, read from its sources, and which experts modules a model has."""

import ast
import functools
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from tritonmoe.integrations.transformers.requirements import check_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "ExpertsClass",
    "UnsupportedClass",
    "experts_classes",
    "experts_modules",
    "is_experts",
    "unsupported_classes",
]

DECORATOR = "use_experts_implementation"
DECORATED_CLASS = re.compile(rf"^@{DECORATOR}\b.*\n(?:@.*\n|[ )].*\n)*class .*\n(?:[ \t)].*\n|\n)*", re.MULTILINE)
UNSUPPORTED_NAMES = re.compile(r"(Experts|ExpertGLU|SparseMLP|SparseMoeBlock|MoE|Moe)$")
"""What classes are called that hold experts but don't go through transformers' registry."""


@dataclass(frozen=True)
class ExpertsClass:
    """One class under transformers' `use_experts_implementation`, as its source describes it."""

    model_type: str
    """The folder under transformers/models."""
    module_name: str
    name: str
    is_gated: bool
    is_transposed: bool
    is_interleaved: bool
    has_bias: bool
    has_post_expert_norm: bool
    has_own_gate: bool
    """It defines `_apply_gate` instead of using the library's `act_fn(gate) * up`."""


@dataclass(frozen=True)
class UnsupportedClass:
    """A class of transformers that holds experts and that no experts implementation reaches."""

    model_type: str
    name: str


def experts_classes() -> list[ExpertsClass]:
    """Return every experts class of the installed transformers, in the order of model folders; imports none of them."""
    return [
        _describe(model_type, module_name, ast.parse(match.group()).body[0])
        for model_type, module_name, text in _modeling_sources()
        for match in DECORATED_CLASS.finditer(text)
    ]


def unsupported_classes() -> list[UnsupportedClass]:
    """Return the experts and MoE blocks of model files that use no experts implementation at all."""
    return [
        UnsupportedClass(model_type, name)
        for model_type, _, text in _modeling_sources()
        if not DECORATED_CLASS.search(text)
        for name in re.findall(r"^class (\w+)", text, re.MULTILINE)
        if UNSUPPORTED_NAMES.search(name)
    ]


class ExpertsModule(nn.Module):
    """What type checkers see of a module under `use_experts_implementation`; no module is made of this class."""

    num_experts: int
    gate_up_proj: nn.Parameter
    """Called up_proj where there is no gate."""
    down_proj: nn.Parameter
    post_expert_norm: nn.Module
    config: "PreTrainedConfig"
    _apply_gate: Callable[[Tensor], Tensor]
    """Of its gate and up columns; where there is a gate."""


def experts_modules(model: nn.Module) -> dict[str, ExpertsModule]:
    """Return the modules of `model` whose forward asks transformers' registry which implementation to run, by name."""
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def is_experts(module: nn.Module) -> TypeGuard[ExpertsModule]:
    """Return whether this module runs through transformers' ExpertsInterface (and not, say, through that of fp8)."""
    return _asks_registry(type(module))


@torch.compiler.assume_constant_result
def _asks_registry(kind: type[nn.Module]) -> bool:
    for base in kind.__mro__:
        forward = vars(base).get("forward")
        if forward is not None:
            if _reads_registry(forward):
                return True
            if "__class__" not in getattr(getattr(forward, "__code__", None), "co_freevars", ()):
                return False  # it calls no super().forward, as Ergo's does: the registry is in its base
    return False


@functools.cache  # of the function, since PEFT's own way makes a class of its own for every forward
def _reads_registry(forward: Callable[..., object]) -> bool:
    if "experts_interface" not in getattr(getattr(forward, "__code__", None), "co_freevars", ()):
        return False
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return inspect.getclosurevars(forward).nonlocals["experts_interface"] is ALL_EXPERTS_FUNCTIONS


def _modeling_sources() -> Iterator[tuple[str, str, str]]:
    """Return folder, module name and text of every model file of the installed transformers."""
    check_transformers()
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ImportError("transformers is not installed: pip install 'tritonmoe[hf]'")
    for path in sorted((Path(spec.origin).parent / "models").glob("*/modeling_*.py")):
        yield path.parent.name, f"transformers.models.{path.parent.name}.{path.stem}", path.read_text(encoding="utf-8")


def _describe(model_type: str, module_name: str, node: ast.stmt) -> ExpertsClass:
    assert isinstance(node, ast.ClassDef)
    calls = [decorator for decorator in node.decorator_list if isinstance(decorator, ast.Call)]
    keywords = [keyword for call in calls if ast.unparse(call.func) == DECORATOR for keyword in call.keywords]
    flags: dict[str, bool] = {
        k.arg: bool(k.value.value) for k in keywords if k.arg and isinstance(k.value, ast.Constant)
    }
    return ExpertsClass(
        model_type,
        module_name,
        node.name,
        is_gated=flags.get("has_gate", True),
        is_transposed=flags.get("is_transposed", False),
        is_interleaved=not flags.get("is_concatenated", node.name != "GptOssExperts"),  # the flag came in 5.8
        has_bias=flags.get("has_bias", False),
        has_post_expert_norm=flags.get("has_post_expert_norm", False),
        has_own_gate=any(isinstance(item, ast.FunctionDef) and item.name == "_apply_gate" for item in node.body),
    )
