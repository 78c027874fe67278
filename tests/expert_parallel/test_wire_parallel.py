"""Expert parallelism over a narrower wire: what it changes is what the format says, forward and backward."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from batches import NAMES, Batch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import tritonmoe as tm
from tritonmoe.transports.emulated.world import EmulatedTransport
from tritonmoe.transports.wire import WireFormat

FP8 = torch.float8_e4m3fn


def parallel(batch: Batch, overlap: tm.OverlapConfig | tm.OverlapPlan) -> tuple[list[dict[str, Tensor]], list]:
    """Outputs and gradients of every rank, and the layers' wire errors."""

    def rank_call(transport):
        leaves = {name: value.requires_grad_() for name, value in batch.of_rank(transport.rank).items()}
        layer_out = batch.call(transport, leaves, overlap, backend="torch")
        grads = torch.autograd.grad(layer_out, list(leaves.values()), batch.tokens["dout"][transport.rank])
        return {"out": layer_out.detach(), **dict(zip(leaves, grads, strict=True))}

    return tm.run_on_emulated_ranks(rank_call, num_ranks=batch.num_ranks)


def straight_through(batch: Batch) -> list[dict[str, Tensor]]:
    """One device, by hand: pairs that leave their rank see the fp8 rows, gradients pass as if they had not."""
    local = batch.num_experts // batch.num_ranks
    leaves = {name: value.clone().requires_grad_() for name, value in batch.weights.items()}
    outs, tokens = [], []
    for rank in range(batch.num_ranks):
        x = batch.tokens["x"][rank].clone().requires_grad_()
        weights = batch.tokens["topk_weights"][rank].clone().requires_grad_()
        ids = batch.ids[rank]
        arrived = torch.empty_like(x.detach())
        wire = WireFormat(x.dtype, FP8)
        wire.decode(wire.encode(x.detach()), arrived)
        seen = x + (arrived - x).detach()
        stays = torch.div(ids, local, rounding_mode="floor") == rank
        out = tm.moe_mlp(x, ids.masked_fill(~stays, -1), weights, **leaves, backend="reference")
        out = out + tm.moe_mlp(seen, ids.masked_fill(stays, -1), weights, **leaves, backend="reference")
        outs.append(out)
        tokens.append((x, weights))
    torch.autograd.backward(outs, batch.tokens["dout"])
    results = []
    for rank, (x, weights) in enumerate(tokens):
        mine = {name: w.grad[rank * local : (rank + 1) * local] for name, w in leaves.items()}
        results.append({"out": outs[rank].detach(), "x": x.grad, "topk_weights": weights.grad, **mine})
    return results


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_fp8_dispatch_is_straight_through(num_ranks, num_chunks):
    batch = Batch(num_ranks, 6, 2, torch.float32)
    expected = straight_through(batch)
    for got, want in zip(
        parallel(batch, tm.OverlapConfig(num_chunks=num_chunks, wire_dtype=FP8)), expected, strict=True
    ):
        for name in ("out", *NAMES):
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5, msg=name)


def test_fp8_does_change_something():
    batch = Batch(2, 6, 2, torch.float32)
    exact = parallel(batch, tm.OverlapConfig(num_chunks=2))
    coarse = parallel(batch, tm.OverlapConfig(num_chunks=2, wire_dtype=FP8))
    assert not torch.equal(exact[0]["out"], coarse[0]["out"])


@pytest.mark.parametrize("wire_dtype", [torch.bfloat16, FP8])
def test_the_overlapped_schedule_gives_the_bits_of_the_serial_one(wire_dtype):
    batch = Batch(3, 6, 2, torch.float32)
    plan = tm.OverlapPlan(chunk_sizes=(1, 2, 1), wire_dtype=wire_dtype)
    for one, other in zip(parallel(batch, plan), parallel(batch, replace(plan, serial=True)), strict=True):
        for name in ("out", *NAMES):
            assert torch.equal(one[name], other[name]), name


def test_bf16_rounds_every_travelling_row_once():
    batch = Batch(2, 6, 2, torch.float32)
    exact = parallel(batch, tm.OverlapConfig(num_chunks=2))
    rounded = parallel(batch, tm.OverlapConfig(num_chunks=2, wire_dtype=torch.bfloat16))
    for one, other in zip(exact, rounded, strict=True):
        for name in ("out", *NAMES):
            scale = one[name].abs().max() if one[name].numel() else 0.0
            # Rows are rounded on the way in and partial sums on the way home: each to 8 bits.
            assert (one[name] - other[name]).abs().le(4 * 2.0**-8 * scale).all(), name
    assert not torch.equal(exact[0]["out"], rounded[0]["out"])


def test_the_error_and_the_bytes_are_reported():
    config = tm.MoEConfig(hidden_size=256, intermediate_size=8, num_experts=4, top_k=2)

    def rank_call(transport):
        errors = []
        for wire_dtype in (None, torch.bfloat16, FP8):
            layer = tm.MoELayer(
                config,
                transport,
                tm.OverlapConfig(num_chunks=2, wire_dtype=wire_dtype),
                generator=torch.Generator().manual_seed(0),
            )
            layer(torch.randn(32, 256, generator=torch.Generator().manual_seed(transport.rank)))
            errors.append((layer.last_report.wire_error, layer.last_report.row_bytes))
        return errors

    for (exact, full), (bf16, half), (fp8, quarter) in tm.run_on_emulated_ranks(rank_call, num_ranks=2):
        assert (exact, full, half, quarter) == (0.0, 1024, 512, 256 + 8)
        assert 2.0**-12 < bf16 < 2.0**-8
        assert 2.0**-7 < fp8 < 2.0**-4


@pytest.mark.parametrize("form", ["fp8_block", "mxfp8"])
def test_numbers_that_became_zeros_or_nan_are_reported(form):
    precision = tm.ExpertPrecision(form)
    config = tm.MoEConfig(hidden_size=256, intermediate_size=8, num_experts=4, top_k=2, expert_precision=precision)

    def rank_call(transport):
        layer = tm.MoELayer(config, transport, dtype=torch.bfloat16)
        x = torch.ones(32, 256, dtype=torch.bfloat16)
        x[0, :4] = torch.tensor([1000, 1e-3, -1e-3, 0])  # two numbers of these too small beside the first
        x[20, 0] = 3.2e38  # past the largest scale: all numbers of its block become NaN
        layer(x)
        report = layer.last_report
        return report.wire_zeroed * x.numel(), report.wire_overflowed * x.numel()

    assert tm.run_on_emulated_ranks(rank_call, num_ranks=2) == [(2, precision.block)] * 2


class Counting(EmulatedTransport):
    """Counts the bytes of rows that a rank sends to others; of ids and weights it sends other dtypes."""

    def exchange(self, rows, input_splits, output_splits, out=None):
        if rows.dtype in (torch.uint8, torch.bfloat16):
            self.sent[-1].append((sum(input_splits) - input_splits[self.rank]) * rows.shape[1] * rows.itemsize)
        return super().exchange(rows, input_splits, output_splits, out)


def note(kept: list[tuple], tensor: Tensor) -> Tensor:
    kept.append((tensor.dtype, tensor.shape))
    return tensor


@pytest.mark.parametrize("form", ["fp8_block", "mxfp8"])
def test_rows_in_a_precision_are_codes_and_scales(form):
    def rank_call(transport):
        transport.__class__, transport.sent = Counting, []
        errors = []
        for precision in (None, tm.ExpertPrecision(form)):
            config = tm.MoEConfig(
                hidden_size=256, intermediate_size=8, num_experts=4, top_k=2, expert_precision=precision
            )
            layer = tm.MoELayer(
                config, transport, tm.OverlapConfig(1), generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16
            )
            x = (
                torch.randn(32, 256, generator=torch.Generator().manual_seed(transport.rank))
                .bfloat16()
                .requires_grad_()
            )
            transport.sent.append([])
            kept: list[tuple] = []
            with saved_tensors_hooks(partial(note, kept), lambda tensor: tensor):
                y = layer(x)
            y.sum().backward()
            num_rows = int(layer.last_report.traffic_rows[:, transport.rank].sum())
            width = layer.last_report.row_bytes // (1 if precision else 2)
            assert (torch.uint8 if precision else torch.bfloat16, (num_rows, width)) in kept
            errors.append(layer.last_report.wire_error)
        report = layer.last_report
        return transport.sent, errors, (report.row_bytes, report.gradient_row_bytes, report.other_row_bytes)

    for (wide, narrow), (exact, error), row_bytes in tm.run_on_emulated_ranks(rank_call, num_ranks=2):
        scales = 256 // tm.ExpertPrecision(form).block
        assert row_bytes == (256 + scales, 256 + scales, 512)
        shares = [one / other for one, other in zip(narrow, wide, strict=True)]
        dispatch = (256 + scales) / 512
        assert shares == [dispatch, 1, dispatch, 1]
        assert dispatch <= 0.516
        assert sum(narrow) / sum(wide) <= 0.758
        assert exact == 0
        assert 2.0**-6 < error < 2.0**-4


def test_ranks_that_disagree_on_the_wire_are_told():
    batch = Batch(2, 6, 2, torch.float32)

    def rank_call(transport):
        overlap = tm.OverlapConfig(num_chunks=1, wire_dtype=FP8 if transport.rank else None)
        with pytest.raises(tm.CountMismatch, match="wire_dtype"):
            batch.call(transport, batch.of_rank(transport.rank), overlap, backend="torch")

    tm.run_on_emulated_ranks(rank_call, num_ranks=2)


def test_rows_that_the_wire_does_not_take_are_refused_on_every_rank():
    batch = Batch(2, 6, 2, torch.float64)

    def rank_call(transport):
        overlap = tm.OverlapConfig(num_chunks=1, wire_dtype=FP8)
        with pytest.raises(TypeError, match=r"can carry rows of .* got torch\.float64"):
            batch.call(transport, batch.of_rank(transport.rank), overlap, backend="reference")

    tm.run_on_emulated_ranks(rank_call, num_ranks=2)
