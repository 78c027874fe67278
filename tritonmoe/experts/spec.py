"""ExpertSpec: how experts compute, decided and checked once for all calls alike; also as a string, for operators."""

from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tritonmoe.config import activations
from tritonmoe.config.activations import Activation, check_activation, is_fused
from tritonmoe.config.formats import weight_shape
from tritonmoe.config.layer import ExpertLayout, KernelOptions, PerWeight, Projection
from tritonmoe.config.literals import read_literal
from tritonmoe.config.precision import ExpertPrecision, check_precision
from tritonmoe.experts.adapted_projection import AdaptedProjection
from tritonmoe.experts.adapter_dropout import AdapterDropout
from tritonmoe.experts.adapters import ExpertAdapters
from tritonmoe.experts.arguments import check_strides
from tritonmoe.experts.quantized_weight import weight_formats
from tritonmoe.experts.reading_ahead import has_streamed
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.ops import backends
from tritonmoe.ops.backends.ops import CalledLayer, Operations
from tritonmoe.ops.backends.precision_choice import operations_in
from tritonmoe.ops.backends.rounded import Directions, RoundedOperations
from tritonmoe.runtime.other_ranks import has_other_ranks

__all__ = [
    "LAYOUT",
    "ExpertSettings",
    "ExpertSpec",
    "choose_backend",
    "decode",
    "encode",
    "expert_spec",
    "from_plain",
    "literal",
    "to_plain",
]


@dataclass(frozen=True)
class ExpertSpec:
    """How experts compute, whatever they are called with: the keyword arguments of moe_mlp that are no tensors."""

    layout: ExpertLayout = field(default_factory=ExpertLayout)
    activation: Activation = "silu"
    backend: str = "auto"
    save: Literal["hidden", "input"] = "hidden"
    options: KernelOptions = KernelOptions()
    precision: ExpertPrecision | None = None
    dropout: float = 0.0
    """Of what adapters multiply."""
    adapters: str = ""
    """The names and scales of adapters that somebody else (PEFT) put on the experts: ranks compare them."""

    @cached_property
    def agreed(self) -> tuple[tuple[str, object], ...]:
        """What must be the same on all ranks that share the experts, by name, as users read it."""
        values = {
            **{name: getattr(self.layout, name) for name in LAYOUT},
            "activation": activation_name(self.activation),
            "expert_precision": self.precision,
        }
        values |= {name: getattr(self, name) for name in OTHERS if name not in FREE}
        return tuple(values.items())

    def check(self) -> "ExpertSpec":
        """Raise ValueError or TypeError unless experts can compute like this somewhere; give itself."""
        check_activation(self.activation, self.layout.gated)
        if self.save not in ("hidden", "input"):
            raise ValueError(f"save must be 'hidden' or 'input', got {self.save!r}")
        self.options.check()
        check_precision(self.precision)
        return self

    @cached_property
    def checked(self) -> "ExpertSpec":
        """Itself, checked once."""
        return self.check()

    def with_dropout(self, adapters: ExpertAdapters | None) -> "ExpertSpec":
        """Return what experts with these adapters compute like."""
        return replace(self, dropout=adapters.dropout) if adapters is not None and adapters.dropout else self


OTHERS = tuple(
    one.name for one in fields(ExpertSpec) if one.name not in ("layout", "activation", "options", "precision")
)
"""The fields that are Python literals."""
FREE = ("backend", "save")
"""Those of them in which ranks may differ; how kernels run (options) is every rank's own matter too."""
LAYOUT = tuple(one.name for one in fields(ExpertLayout))
"""The names of what a layout says, by which MoEConfig has it too."""


def activation_name(activation: Activation) -> str:
    """Return what an activation is called; a callable goes by its name."""
    if is_fused(activation):
        return str(activation)
    named: object = activation
    while isinstance(named, partial):
        named = named.func
    return f"the callable {getattr(named, '__qualname__', type(named).__qualname__)}"


class ExpertSettings(NamedTuple):
    """An ExpertSpec whose backend is chosen, for one device, dtype, number of experts and K."""

    ops: Operations
    spec: ExpertSpec
    options: KernelOptions
    """Those of the spec, and whether exchanges run beside the kernels."""
    layer: CalledLayer

    def rounded_rows(self, rows: Tensor) -> Tensor:
        """Return rows x or dout (T, D), before they go to experts, as the experts' products take them."""
        return self.ops.round_rows(rows) if isinstance(self.ops, RoundedOperations) else rows

    def projections(
        self, weights: PerWeight[Tensor], row_seeds: Tensor | None = None, directions: Directions = "both"
    ) -> tuple[AdaptedProjection, AdaptedProjection]:
        """Return the up-projection and the down-projection of experts that have these weights.

        row_seeds: (R,), with dropout; of the up-projection, callers drop columns of the rows themselves.
        directions: of which products, in an ExpertPrecision.
        """
        w1, b1, w2, b2, up_a, up_b, down_a, down_b, up_scales, down_scales = weights
        up = Projection(w1, b1, self.spec.layout, scales=up_scales)
        down = Projection(w2, b2, self.spec.layout, scales=down_scales)
        if isinstance(self.ops, RoundedOperations):
            # A callable activation's half of the experts has one projection.
            up, down = (of if of.weight is None else self.ops.projection(of, directions) for of in (up, down))
        dropout = self.adapter_dropout(row_seeds)
        return (
            AdaptedProjection(self.ops, self.options, up, up_a, up_b),
            AdaptedProjection(self.ops, self.options, down, down_a, down_b, dropout),
        )

    def adapter_dropout(self, row_seeds: Tensor | None) -> AdapterDropout | None:
        """Return the dropout on what the adapters of a call with these row_seeds (R,) multiply."""
        return None if row_seeds is None else AdapterDropout(self.spec.dropout, row_seeds)


def expert_spec(**settings: Any) -> ExpertSpec:
    """Return the checked spec of keyword arguments of moe_mlp, which calls with the same arguments share.

    Under torch.compile it is not checked yet, so that ranks can be told of a wrong one when the graph runs.
    Raises:
        ValueError, TypeError: experts can't compute like this.
    """
    if torch.compiler.is_compiling():
        return _make_spec(**settings)
    if is_fused(settings.get("activation", "silu")):  # a callable, and its parameters, would be kept alive
        try:
            return _checked_spec(**settings)
        except TypeError:  # perhaps since an argument has no hash, which is not what is wrong with it
            pass
    return _make_spec(**settings).check()


def _make_spec(**settings: Any) -> ExpertSpec:
    layout = ExpertLayout(**{name: value for name, value in settings.items() if name in LAYOUT})
    options = KernelOptions(**{name: value for name, value in settings.items() if name in KernelOptions._fields})
    others = {name: value for name, value in settings.items() if name not in (*LAYOUT, *KernelOptions._fields)}
    return ExpertSpec(layout=layout, options=options, **others)


@lru_cache(maxsize=1024, typed=True)  # typed: 1 is not True here
def _checked_spec(**settings: Any) -> ExpertSpec:
    return _make_spec(**settings).check()


def choose_backend(spec: ExpertSpec, inputs: CallTensors[Tensor], *, beside_exchanges: bool = False) -> ExpertSettings:
    """Choose the backend for x's device and dtype, the number of experts on this device, and K.

    beside_exchanges: as in KernelOptions; where there are other ranks it is so in any case.
    Raises:
        ValueError, TypeError: the backend is not known, or can't compute such a call.
    """
    options = spec.options
    if beside_exchanges or has_other_ranks():
        options = options._replace(beside_exchanges=True)
    x, weights, top_k = inputs.x, inputs.weights, inputs.topk_ids.shape[1]
    shape = weight_shape(weights.gate_up_proj, weights.gate_up_scales)
    layer = CalledLayer(
        spec.layout,
        spec.activation if is_fused(spec.activation) else None,
        x.shape[1],
        spec.layout.intermediate_size(shape[2 if spec.layout.transposed else 1]),
        weights.gate_up_bias is not None,
        weight_formats(weights),
    )
    is_streamed = has_streamed(weights)
    ops = backends.choose(
        "torch" if is_streamed and spec.backend == "auto" else spec.backend,
        x.device,
        x.dtype,
        options,
        num_experts=shape[0],
        top_k=top_k,
        layer=layer,
    )
    if is_streamed and not backends.fetches_experts(ops):
        raise ValueError(
            f"offloaded experts are computed by the backend 'torch', and this call would be by {ops.__name__}: use "
            "backend='auto' or 'torch'"
        )
    if backends.launches_kernels(ops):
        check_strides(inputs)
    if spec.precision is not None:
        ops = operations_in(ops, spec.precision, spec.backend, x.device, options, shape[0], top_k, layer)
    return ExpertSettings(ops, spec, options, layer)


# As a string


def to_plain(spec: ExpertSpec) -> tuple[object, ...]:
    """Return a spec whose activation is fused as a tuple of Python literals, which from_plain() reads."""
    assert is_fused(spec.activation)
    layout = tuple([getattr(spec.layout, name) for name in LAYOUT])
    activation = activations.to_plain(spec.activation)
    precision = None if spec.precision is None else (spec.precision.format, spec.precision.weight_gradients)
    return layout, activation, tuple(spec.options), precision, *[getattr(spec, name) for name in OTHERS]


def from_plain(plain: tuple[Any, ...]) -> ExpertSpec:
    layout, activation, options, precision, *others = plain
    return ExpertSpec(
        layout=ExpertLayout(**dict(zip(LAYOUT, layout, strict=True))),
        activation=activations.from_plain(activation),
        options=KernelOptions(*options),
        precision=None if precision is None else ExpertPrecision(*precision),
        **dict(zip(OTHERS, others, strict=True)),
    )


def literal(plain: object) -> str:
    """Return the literal of what to_plain() gave, or of a tuple of such; read_literal() reads it."""
    return repr(_settled(plain) if torch.compiler.is_compiling() else plain)


def _settled(plain: object) -> object:
    """Return the same with numbers that are known: while it traces, torch.compile may have left their values open."""
    if isinstance(plain, tuple):
        return tuple([_settled(value) for value in plain])
    if isinstance(plain, bool):
        return plain
    if isinstance(plain, int):
        return len(range(plain))
    if isinstance(plain, float):
        numerator, denominator = plain.as_integer_ratio()
        return numerator / denominator
    return plain


def encode(spec: ExpertSpec) -> str:
    """Return a spec whose activation is fused as the string that an operator takes for it."""
    return literal(to_plain(spec))


@lru_cache(maxsize=1024)
def decode(encoded: str) -> ExpertSpec:
    """Return the spec that encode() made the string of, checked."""
    return from_plain(read_literal(encoded)).check()
