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
