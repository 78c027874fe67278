"""What a layer's report says of its call."""

import torch

import tritonmoe as tm
from tritonmoe.overlap.report import LayerReport
from tritonmoe.transports import Transport


def test_offsets_end_with_the_rows_of_a_rank() -> None:
    """Two chunks of experts, whose rows return in other chunks than they came in."""
    config = tm.MoEConfig(hidden_size=16, intermediate_size=8, num_experts=8, top_k=3)

    def on_rank(transport: Transport) -> LayerReport:
        overlap = tm.OverlapConfig(2, chunk_by="experts")
        layer = tm.MoELayer(config, transport, overlap, generator=torch.Generator().manual_seed(0))
        layer(torch.randn(20, 16, generator=torch.Generator().manual_seed(transport.rank)))
        return layer.last_report

    for report in tm.run_on_emulated_ranks(on_rank, 2):
        assert report.send_offsets[-1] == report.traffic_rows[report.rank].sum()
        assert report.return_offsets[-1] == report.traffic_rows[:, report.rank].sum()


def test_a_report_prints_the_times_of_its_passes() -> None:
    def on_rank(transport: Transport) -> LayerReport:
        layer = tm.MoELayer(tm.MoEConfig(8, 8, num_experts=4, top_k=2), transport, generator=torch.Generator())
        layer(torch.ones(3, 8)).sum().backward()
        return layer.last_report

    report, _ = tm.run_on_emulated_ranks(on_rank, 2)
    total_ms, exposed_ms = 1e3 * report.forward.total_s, 1e3 * report.forward.exposed_communication_s
    assert f"forward=PassReport({total_ms:.2f} ms: " in repr(report)
    assert f"{exposed_ms:.2f} ms of them exposed)" in repr(report.forward)
    assert "backward=PassReport(" in repr(report)
    report.forward._origin = object()  # as a mark of a captured call, which has no time
    assert repr(report.forward) == "PassReport(not timed)"
