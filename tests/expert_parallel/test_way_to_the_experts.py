"""How much Python stands between a layer's forward and its first kernel."""

import sys
from pathlib import Path
from types import FrameType

import torch

import tritonmoe as tm
from tritonmoe.transports import Transport

PACKAGE = f"{Path(tm.__file__).parent}/"
MOST_FUNCTIONS = 200
"""As many as there were when this was last counted: more need a reason, fewer a new number."""


def test_functions_entered_before_the_grouping() -> None:
    """On one of four ranks, those of transports apart, of which the emulated ones depend on who comes first."""
    entered: list[str] = []
    has_come: list[str] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if event != "call" or has_come or not path.startswith(PACKAGE):
            return
        path = path.removeprefix(PACKAGE)
        if path.startswith("ops/backends/") and name == "group":
            has_come.append(path)
        elif not path.startswith("transports/") and (not name.startswith("<") or name == "<lambda>"):
            entered.append(f"{path} {name}")

    def on_rank(transport: Transport) -> None:
        generator = torch.Generator().manual_seed(0)
        config = tm.MoEConfig(hidden_size=16, intermediate_size=12, num_experts=8, top_k=2)
        layer = tm.MoELayer(config, transport, tm.OverlapConfig(2), backend="torch", generator=generator)
        x = torch.randn(10, 16, generator=generator, requires_grad=True)
        layer(x).sum().backward()
        sys.setprofile(profile if transport.rank == 0 else None)
        try:
            y = layer(x)
        finally:
            sys.setprofile(None)
        y.sum().backward()

    tm.run_on_emulated_ranks(on_rank, 4, timeout_s=60)
    assert has_come
    assert len(entered) <= MOST_FUNCTIONS, "\n".join(entered)
