"""Ranks of test_waiting.py: `waiting_worker.py CASE...` under torchrun says "passed CASE" of each on rank 0.

In each case rank 1 comes late to something, and the others must have said what, and that they wait for it alone.
"""

import logging
import re
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import tritonmoe as tm
from tritonmoe.expert_parallel.layer_pass import ForwardPass
from tritonmoe.transports import as_transport, waiting

CONFIG = tm.MoEConfig(hidden_size=8, intermediate_size=8, num_experts=6, top_k=2)
LATE = 1
SAID: list[str] = []


class Kept(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        SAID.append(record.getMessage())


def come_late() -> None:
    """Have rank 1 come when the others have said it."""
    if dist.get_rank() == LATE:
        time.sleep(4 * waiting.SAY_AFTER_S)


def check_said(what: str, whom: str = r"ranks \[1\]") -> None:
    if dist.get_rank() != LATE:
        pattern = rf"rank {dist.get_rank()} of 3 has waited \S+ s in: {what}, for {whom}\. It (raises after|goes on)"
        assert any(re.match(pattern, said) for said in SAID), (pattern, SAID)


def layer() -> tm.MoELayer:
    torch.manual_seed(0)
    return tm.MoELayer(CONFIG, dist.group.WORLD, tm.OverlapConfig(1))


def x() -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(dist.get_rank()))


def case_parallelize() -> None:
    torch.manual_seed(0)
    module = tm.MoELayer(CONFIG)
    come_late()
    tm.parallelize(module, dist.group.WORLD)
    check_said("the comparison of the ranks' weights")


def case_forward() -> None:
    moe = layer()
    moe(x())
    come_late()
    moe(x())
    check_said(r"the count exchange of the forward of layer \d+, call \d+")


def case_rows() -> None:
    moe, dispatch = layer(), ForwardPass.dispatch
    if dist.get_rank() == LATE:
        ForwardPass.dispatch = lambda self, chunk: (come_late(), dispatch(self, chunk))[1]
    moe(x())
    ForwardPass.dispatch = dispatch
    check_said(r"step dispatch, chunk 0, of layer \d+, call \d+")


def case_backward() -> None:
    loss = layer()(x()).sum()
    come_late()
    loss.backward()
    check_said(r"the agreement on the backward of layer \d+, call \d+")


def case_all_reduce() -> None:
    come_late()
    as_transport(dist.group.WORLD).all_reduce(torch.ones(2))
    check_said(r"all_reduce \(sum\) of \(2,\) torch\.float32 on cpu")


def case_barrier() -> None:
    come_late()
    as_transport(dist.group.WORLD).barrier()
    check_said("barrier")


def clip(clip_grad_norm_, what: str) -> None:
    moe = layer()
    moe(x()).sum().backward()
    come_late()
    clip_grad_norm_(moe.parameters(), 1.0)
    check_said(what)


def case_clip_grad_norm_() -> None:
    clip(tm.clip_grad_norm_, "clip_grad_norm_")


def case_torchs_clipping() -> None:
    clip(torch.nn.utils.clip_grad_norm_, "a norm or sum over experts")


def case_state_dict() -> None:
    moe = layer()
    tm.gather_state_dicts(moe)
    come_late()
    moe.state_dict()
    check_said(r"the gathering of spread experts in state_dict\(\)")


def case_one_state_dict() -> None:
    """Ranks that wait in different calls for each other say so."""
    moe = layer()
    tm.gather_state_dicts(moe)
    if dist.get_rank() == LATE:
        as_transport(dist.group.WORLD).barrier()
        moe.state_dict()
        other = r"\(rank 0 waits in: the gathering of spread experts in state_dict\(\); rank 2 waits in: "
        assert any(re.search(rf"in: barrier, for ranks \[0, 2\] {other}", said) for said in SAID), SAID
    else:
        gathering = threading.Thread(target=moe.state_dict)
        gathering.start()
        time.sleep(4 * waiting.SAY_AFTER_S)
        as_transport(dist.group.WORLD).barrier()
        gathering.join()
        check_said(r"the gathering of spread experts in state_dict\(\)", r"ranks \[1\] \(rank 1 waits in: barrier\)")


def case_replicas() -> None:
    """A backward that averages over replicas."""
    mesh = DeviceMesh("cpu", [[0], [1], [2]], mesh_dim_names=("replica", "expert"))
    torch.manual_seed(0)
    loss = tm.MoELayer(CONFIG, mesh)(x()).sum()
    come_late()
    loss.backward()
    check_said("a backward, before the average of experts' gradients over their replicas")


def case_rebuild() -> None:
    transport = as_transport(dist.new_group([0, 1, 2]))
    come_late()
    transport.exchange_counts(torch.zeros(3, 1, dtype=torch.int64))
    check_said("the first exchange")
    SAID.clear()
    come_late()
    transport.rebuild()
    check_said(r"rebuild\(\)")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    logging.getLogger("tritonmoe").addHandler(Kept())
    layer()(x()).sum().backward()  # imports
    waiting.SAY_AFTER_S = 1.0
    for case in sys.argv[1:]:
        dist.barrier()
        SAID.clear()
        globals()[f"case_{case}"]()
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"passed {case}", flush=True)
    dist.destroy_process_group()
