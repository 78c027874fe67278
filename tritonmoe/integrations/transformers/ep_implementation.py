"""The expert-parallel implementation "tritonmoe" of transformers 5.23 and later; this file imports transformers."""

from typing import ClassVar

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation

from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.expert_parallel.state import LayerCalls
from tritonmoe.integrations.transformers.discovery import ExpertsModule
from tritonmoe.integrations.transformers.experts import experts_forward
from tritonmoe.integrations.transformers.generation import patch_generate
from tritonmoe.placement.expert_shards import ExpertShards, Sharding, attach_shards
from tritonmoe.transports import as_transport

__all__ = ["OverlappedEP"]


class OverlappedEP(EPImplementation):
    """Each token goes once to every rank that holds any of its experts, in chunks that overlap with the experts.

    The ranks of a TP group share one batch: each takes its slice of the tokens, an even share that may be empty, and
    the slices' outputs are gathered. Every rank of an EP group makes the same calls, those without tokens included.
    """

    overlap: ClassVar[OverlapConfig] = OverlapConfig()

    def __init__(self, experts: ExpertsModule, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        if getattr(experts, "has_post_expert_norm", False) and tp_mesh.size() > 1:
            raise ValueError(
                f'ep_implementation="tritonmoe" runs the norm of {type(experts).__name__} where a token came from, '
                "which would leave its gradient partial over the tensor-parallel ranks: use fsdp_size instead of "
                'tp_size, or ep_implementation="all_to_all"'
            )
        self.experts = experts
        transport = as_transport(ep_mesh)
        num_experts, calls = experts.num_experts * transport.size, LayerCalls(transport)
        attach_shards(experts, ExpertShards(Sharding(transport, None), num_experts, calls, self.overlap))
        patch_generate()

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return (T, D) of hidden_states (T, D), global ids and weights (T, K)."""
        if self.tp_mesh.size() == 1:
            return experts_forward(self.experts, hidden_states, top_k_index, top_k_weights)
        # Through DTensors: the gradients of the slices must be gathered, or each rank's would be partial.
        rows, ids, weights = (self._own_slice(tensor) for tensor in (hidden_states, top_k_index, top_k_weights))
        out = experts_forward(self.experts, rows, ids, weights)
        shape = hidden_states.shape
        spread = DTensor.from_local(out.contiguous(), self.tp_mesh, [Shard(0)], shape=shape, stride=(shape[1], 1))
        return spread.full_tensor()

    def _own_slice(self, tensor: Tensor) -> Tensor:
        shared = DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False)
        return shared.redistribute(self.tp_mesh, [Shard(0)]).to_local()
