"""The torch backend operation by operation against the reference; the signatures of all three backends."""

import inspect
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from kernel_cases import LAYOUTS as LAYOUTS_OF_KERNELS
from tolerance import assert_close_to_exact
from torch import Tensor

import tritonmoe as tm
from tritonmoe.config.activations import ACTIVATION_NAMES, ClampedSwiGLU, SoftcappedSwiGLU
from tritonmoe.config.layer import ExpertLayout, PerWeight, Projection
from tritonmoe.ops.backends import choose, reference, torch_products
from tritonmoe.ops.backends import torch as torch_backend
from tritonmoe.ops.backends import triton as triton_backend
from tritonmoe.ops.backends.kernel_check import LayerCase
from tritonmoe.ops.backends.ops import NO_GRADIENTS, GradientOperands, Operations
from tritonmoe.ops.grouping import Grouping, RowSources

OPERATIONS = ("group", "up", "down", "gather_sum", "down_grad", "up_grad", "weight_grad")
WITH_CODES = ("up", "down", "down_grad", "up_grad")
LAYOUTS = {name: LAYOUTS_OF_KERNELS[name] for name in ("concatenated", "interleaved", "transposed", "ungated")}
HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 9, 6, 5, 3


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("backend", [torch_backend, triton_backend], ids=["torch", "triton"])
def test_signatures_are_those_of_the_reference(backend: ModuleType, operation: str) -> None:
    """But for `codes`, which EncodedOperations alone hands to the kernels."""
    expected = inspect.signature(getattr(reference, operation))
    found = inspect.signature(getattr(backend, operation))
    parameters = [parameter for name, parameter in found.parameters.items() if name != "codes"]
    assert found.replace(parameters=parameters) == expected
    assert ("codes" in found.parameters) == (backend is triton_backend and operation in WITH_CODES)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "up"])  # which is overloaded
def test_the_reference_has_the_signatures_of_the_contract(operation: str) -> None:
    _, *expected = inspect.signature(getattr(Operations, operation)).parameters.values()
    assert list(inspect.signature(getattr(reference, operation)).parameters.values()) == expected


def test_choice() -> None:
    cpu = torch.device("cpu")
    assert choose("auto", cpu, torch.float32) is torch_backend
    assert choose("torch", cpu, torch.float32) is torch_backend
    assert choose("reference", cpu, torch.float64) is reference
    assert choose("auto", torch.device("cuda"), torch.float32) is triton_backend
    assert choose("auto", torch.device("cuda"), torch.float64) is torch_backend
    for limits, chosen in (
        ({"num_experts": 1024, "top_k": 16}, triton_backend),
        ({"num_experts": 1025}, torch_backend),
        ({"top_k": 17}, torch_backend),
    ):
        assert choose("auto", torch.device("cuda"), torch.float32, **limits) is chosen


class Operands(LayerCase):
    """Operands of every operation in one dtype; rows in `num_chunks` equal chunks from two ranks."""

    def __init__(self, layout: ExpertLayout, dtype: torch.dtype, num_rows: int = 14, num_chunks: int = 1) -> None:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(-1, NUM_EXPERTS + 1, (num_rows, TOP_K), generator=generator)
        ids[ids == 3] = 1  # expert 3 is empty
        super().__init__(ids, NUM_EXPERTS, layout, dtype, sizes=(HIDDEN, INTERMEDIATE), seed=2)
        # Results of earlier operations, as operands of later ones.
        num_pairs = int(((ids >= 0) & (ids < NUM_EXPERTS)).sum())
        self.h, self.a = self.draw(num_pairs, self.width), self.draw(num_pairs, INTERMEDIATE)
        self.y, self.dh = self.draw(num_pairs, HIDDEN), self.draw(num_pairs, self.width)
        self.num_chunks, self.num_rows = num_chunks, num_rows

    def group(self, backend: ModuleType) -> Grouping:
        if self.num_chunks == 1:
            return backend.group(self.ids, NUM_EXPERTS)
        offsets = tuple(self.num_rows * c // self.num_chunks for c in range(self.num_chunks + 1))
        is_working = (self.ids >= 0) & (self.ids < NUM_EXPERTS)
        pair_offsets = tuple(int(is_working[:last].sum()) for last in offsets)
        sizes = [last - first for first, last in pairwise(offsets)]
        return backend.group(
            self.ids,
            NUM_EXPERTS,
            chunk_row_offsets=offsets,
            chunk_pair_offsets=pair_offsets,
            row_sources=RowSources((0, 1), torch.tensor([[size - size // 2, size // 2] for size in sizes])),
        )


def run(backend: ModuleType, o: Operands, activation, into_views: bool = False) -> dict[str, Tensor]:
    """Run every operation, chunk by chunk; into_views: results go to given tensors."""
    layout, whole = o.layout, o.group(backend)
    found: dict[str, list[Tensor]] = {}

    def keep(**results: Tensor | None) -> None:
        for name, value in results.items():
            if value is not None:
                found.setdefault(name, []).append(value)

    def views(**like: Tensor) -> dict[str, Tensor]:
        if not into_views:
            return {}
        return {
            name: torch.full((len(t) + 2, *t.shape[1:]), torch.nan, dtype=t.dtype)[1:-1] for name, t in like.items()
        }

    for c in range(whole.num_chunks):
        grouping = whole.chunk(c)
        pairs = slice(*whole.chunk_pair_offsets[c : c + 2])
        rows = slice(*whole.chunk_row_offsets[c : c + 2])
        given = views(out_h=o.h[pairs])
        h, a = backend.up(o.x, o.gate_up, grouping, activation, **given)
        keep(h=h, a=a)
        assert not given or h is given["out_h"]
        given = views(out=o.y[pairs])
        keep(y=backend.down(o.a[pairs], o.down, grouping, **given))
        keep(y_no_bias=backend.down(o.a[pairs], o.down._replace(bias=None), grouping))
        keep(out=backend.gather_sum(o.y[pairs], grouping.inverse, o.weights[rows], **views(out=o.x[rows])))
        keep(unweighted=backend.gather_sum(o.y[pairs], grouping.inverse, **views(out=o.x[rows])))
        for name, hidden, act in (("", o.h[pairs], activation), ("callable_", o.a[pairs], None)):
            given = views(dh=hidden, scaled_a=o.a[pairs])
            out = {"out": tuple(given.values())} if given else {}
            dh, scaled_a, dweights = backend.down_grad(o.dout, o.down, hidden, o.weights, grouping, act, **out)
            keep(**{f"{name}dh": dh, f"{name}scaled_a": scaled_a, f"{name}dweights": dweights})
        given = views(out=o.y[pairs])
        keep(dx=backend.up_grad(o.dh[pairs], o.gate_up, grouping, **given))
    operands = GradientOperands(o.x, o.dh, o.dout, o.a, o.weights)
    grads = backend.weight_grad(whole, layout, operands, PerWeight(True, True, True, True))
    keep(dw1=grads.gate_up_proj, db1=grads.gate_up_bias, dw2=grads.down_proj, db2=grads.down_bias)
    return {name: torch.cat(values) for name, values in found.items()}


def check(operands: Operands, activation) -> None:
    """Compare with the reference in fp64, and with one that computes in the operands' own dtype throughout."""
    exact = run(reference, operands.double(), activation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "accumulation_dtype", lambda dtype: dtype)
        plain = run(reference, operands, activation)
    actual, dtypes = run(torch_backend, operands, activation), run(reference, operands, activation)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert_close_to_exact(name, value, plain[name].to(dtypes[name].dtype), exact[name])


@pytest.fixture
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(torch_backend, "MAX_BLOCK_PAIRS", request.param)
    return request.param


@pytest.mark.parametrize("small_blocks", [1, 3, 512], ids="block{}".format, indirect=True)
@pytest.mark.parametrize("num_chunks", [1, 3], ids="C{}".format)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_operations(dtype: torch.dtype, layout: str, num_chunks: int, small_blocks: int) -> None:
    """Blocks smaller than an expert, and than many experts, as well as the real size."""
    operands = Operands(LAYOUTS[layout], dtype, num_chunks=num_chunks)
    check(operands, "gelu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_chunks", [1, 3], ids="C{}".format)
def test_sums_on_a_gpu_read_no_index(num_chunks: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a pair is skipped is for the device alone to know."""
    monkeypatch.setattr(torch_backend, "copies_late", lambda device: True)
    check(Operands(LAYOUTS["concatenated"], dtype, num_chunks=num_chunks), "gelu")


@pytest.mark.parametrize("num_chunks", [1, 3], ids="C{}".format)
def test_what_the_host_has_read_is_what_is_on_the_device(num_chunks: int) -> None:
    grouping = Operands(LAYOUTS["concatenated"], torch.float32, num_chunks=num_chunks).group(torch_backend)
    assert vars(grouping)["host_expert_offsets"] == grouping.expert_offsets.tolist()
    for index in range(num_chunks):
        chunk = grouping.chunk(index)
        assert vars(chunk)["host_expert_offsets"] == chunk.expert_offsets.tolist()
        for block in chunk.blocks(3):
            assert block.grouping.host_expert_offsets == block.grouping.expert_offsets.tolist()


@pytest.mark.parametrize(
    "activation",
    [*ACTIVATION_NAMES, ClampedSwiGLU(0.5, alpha=1.702, up_offset=1.0), SoftcappedSwiGLU(0.7, 1.5)],
    ids=str,
)
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
def test_activations_of_a_chunk(layout: str, activation) -> None:
    check(Operands(LAYOUTS[layout], torch.float64, num_chunks=2), activation)


@pytest.mark.parametrize("backend", [torch_backend, reference], ids=["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_chunks", [1, 2], ids="C{}".format)
def test_given_outputs_are_filled(num_chunks: int, dtype: torch.dtype, backend: ModuleType) -> None:
    """Up to the last bit: a CPU's product rounds differently where memory is not aligned."""
    operands = Operands(LAYOUTS["concatenated"], dtype, num_chunks=num_chunks)
    fresh, given = run(backend, operands, "silu"), run(backend, operands, "silu", into_views=True)
    for name, value in given.items():
        torch.testing.assert_close(value, fresh[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [torch_backend, reference], ids=["torch", "reference"])
def test_gather_sum_example(dtype: torch.dtype, backend: ModuleType) -> None:
    y, index = (
        torch.tensor([[1.0], [2.0], [4.0]], dtype=dtype),
        torch.tensor([[0, 2], [-1, 1], [-1, -1]], dtype=torch.int32),
    )
    assert backend.gather_sum(y, index).tolist() == [[5.0], [2.0], [0.0]]
    weights = torch.tensor([[10.0, 100.0], [torch.nan, 0.5], [torch.inf, torch.nan]])
    assert backend.gather_sum(y, index, weights).tolist() == [[410.0], [1.0], [0.0]]


@pytest.mark.parametrize("backend", [torch_backend, reference], ids=["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "num_slots", "num_pairs"), [(0, 2, 3), (3, 2, 0), (3, 0, 2)], ids=["T0", "N0", "J0"]
)
def test_gather_sum_of_nothing(num_rows: int, num_slots: int, num_pairs: int, dtype, backend: ModuleType) -> None:
    y = torch.ones(num_pairs, 4, dtype=dtype)
    index = torch.full((num_rows, num_slots), -1, dtype=torch.int32)
    for weights in (None, torch.ones(num_rows, num_slots)):
        out = backend.gather_sum(y, index, weights)
        assert torch.equal(out, torch.zeros(num_rows, 4, dtype=dtype))
        given = torch.full((num_rows, 4), torch.nan, dtype=dtype)
        backend.gather_sum(y, index, weights, out=given)
        assert torch.equal(given, out)


@pytest.mark.parametrize("backend", [torch_backend, reference], ids=["torch", "reference"])
def test_gather_sum_sums_in_fp32_and_in_slot_order(backend: ModuleType) -> None:
    """In bf16 steps 256 + 1 - 256 would be 0; fp32 sums that need an order tell slots apart."""
    y = torch.tensor([[256.0], [1.0], [-256.0]], dtype=torch.bfloat16)
    assert backend.gather_sum(y, torch.tensor([[0, 1, 2]], dtype=torch.int32)).tolist() == [[1.0]]
    y = torch.tensor([[2.0**25], [1.0], [-(2.0**25)]])
    assert backend.gather_sum(y, torch.tensor([[0, 1, 2]], dtype=torch.int32)).tolist() == [[0.0]]
    assert backend.gather_sum(y, torch.tensor([[0, 2, 1]], dtype=torch.int32)).tolist() == [[1.0]]


@pytest.mark.parametrize("backend", [torch_backend, reference], ids=["torch", "reference"])
def test_weight_grad_gives_only_what_is_asked_for(backend: ModuleType) -> None:
    o = Operands(LAYOUTS["concatenated"], torch.float32)
    grouping, layout = o.group(backend), o.layout
    everything = run(backend, o, "silu")
    only_w1 = backend.weight_grad(
        grouping, layout, GradientOperands(x=o.x, dh=o.dh), NO_GRADIENTS._replace(gate_up_proj=True)
    )
    assert set(only_w1[1:]) == {None}
    assert torch.equal(only_w1.gate_up_proj, everything["dw1"])
    only_b1 = backend.weight_grad(grouping, layout, GradientOperands(dh=o.dh), NO_GRADIENTS._replace(gate_up_bias=True))
    assert (only_b1.gate_up_proj, only_b1.down_proj, only_b1.down_bias) == (None, None, None)
    assert torch.equal(only_b1.gate_up_bias, everything["db1"])
    operands = GradientOperands(dout=o.dout, scaled_a=o.a)
    only_w2 = backend.weight_grad(grouping, layout, operands, NO_GRADIENTS._replace(down_proj=True))
    assert (only_w2.gate_up_proj, only_w2.gate_up_bias, only_w2.down_bias) == (None, None, None)
    assert torch.equal(only_w2.down_proj, everything["dw2"])
    operands = GradientOperands(dout=o.dout, topk_weights=o.weights)
    only_b2 = backend.weight_grad(grouping, layout, operands, NO_GRADIENTS._replace(down_bias=True))
    assert only_b2[:3] == (None, None, None)
    assert torch.equal(only_b2.down_bias, everything["db2"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_expert_of_many_blocks(dtype: torch.dtype) -> None:
    """1300 rows of one expert are three blocks, next to small experts that share one."""
    operands = Operands(LAYOUTS["concatenated"], dtype, num_rows=1300)
    operands.ids[:, 0] = 2
    operands.ids[:, 1:] = torch.where(torch.arange(1300)[:, None] < 20, operands.ids[:, 1:], -1)
    num_pairs = int(((operands.ids >= 0) & (operands.ids < NUM_EXPERTS)).sum())
    generator = torch.Generator().manual_seed(2)
    for name in ("h", "a", "y", "dh"):
        width = getattr(operands, name).shape[1]
        setattr(operands, name, torch.randn(num_pairs, width, generator=generator).to(dtype))
    check(operands, "silu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_whose_pairs_share_a_batched_product_share_no_values(dtype: torch.dtype) -> None:
    num_experts, width, inner = 4, 6, 5
    ids = torch.tensor([[1], [1], [1], [3], [3]])  # experts 0 and 2 have none
    grouping = torch_backend.group(ids, num_experts)
    assert torch_products.pads(grouping)
    rows, values = torch.randn(5, width, dtype=dtype), torch.randn(5, inner, dtype=dtype)
    rows[1], values[2] = torch.inf, torch.nan  # both of expert 1
    weight = torch.randn(num_experts, width, inner, dtype=dtype)
    layout = ExpertLayout(gated=False, transposed=True)
    h, _ = torch_backend.up(rows, Projection(weight, None, layout), grouping, None)
    torch.testing.assert_close(h[3:], rows[3:] @ weight[3])
    operands = GradientOperands(x=rows, dh=values)
    grads = torch_backend.weight_grad(grouping, layout, operands, NO_GRADIENTS._replace(gate_up_proj=True))
    assert grads.gate_up_proj is not None
    assert not grads.gate_up_proj[1].isfinite().all()
    torch.testing.assert_close(grads.gate_up_proj[3], rows[3:].mT @ values[3:])
    assert grads.gate_up_proj[[0, 2]].count_nonzero() == 0


@pytest.mark.parametrize("num_tokens", [90, 900], ids="T{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_not_finite_stays_with_its_expert(dtype: torch.dtype, num_tokens: int) -> None:
    """Products of narrow dtypes take rows of the next expert along."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(num_tokens).view(-1, 1).remainder(2)  # 45 or 450 pairs each
    weights = [torch.randn(2, *shape, generator=generator).to(dtype) for shape in ((32, 24), (24, 16))]
    topk_weights = torch.rand(num_tokens, 1, generator=generator)
    good = torch.randn(num_tokens, 24, generator=generator).to(dtype)
    for damaged in (0, 1):
        own, others = ids.view(-1) == damaged, ids.view(-1) != damaged
        found = []
        for x in (good, good.masked_fill(own.view(-1, 1), torch.nan)):
            leaves = [t.clone().requires_grad_() for t in (x, topk_weights, *weights)]
            y = tm.moe_mlp(leaves[0], ids, *leaves[1:], backend="torch")
            found.append([y, *torch.autograd.grad(y.float().sum(), leaves)])
        for clean, value in zip(*found, strict=True):
            part = others if value.shape[0] == num_tokens else [1 - damaged]
            assert torch.equal(clean[part], value[part])
            assert value[own if value.shape[0] == num_tokens else [damaged]].isnan().all()
