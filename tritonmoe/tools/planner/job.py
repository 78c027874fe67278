"""Job: how a model is trained on a cluster: batch, parallel degrees, recomputation, and the trainer that runs it."""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from tritonmoe.config.formats import FORMATS, WeightFormat, find_format
from tritonmoe.config.precision import BLOCKS, ExpertPrecision
from tritonmoe.tools.planner.cluster import DTYPE_BYTES, Cluster
from tritonmoe.tools.planner.transformer_model import Model
from tritonmoe.transports.wire import Wires, choose_wires

__all__ = [
    "FROZEN",
    "TRAINERS",
    "UNKNOWN_IMBALANCE",
    "Job",
    "Recompute",
    "Sends",
    "Trainer",
    "expert_degrees",
    "trained_by",
]

Recompute = Literal["none", "selective", "experts", "full"]
"""What the backward computes again: nothing; norms, rotations and activations, with queries, keys and values of latent
attention, but no other product; h of the experts (save="input"); or all layers' forward and exchanges. Each takes
longer than those before it, and needs less memory."""

ROW_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}
FROZEN = ("bf16", *FORMATS)
"""How the experts of a frozen model can be stored: plain, or packed."""


@dataclass(frozen=True)
class Job:
    """A training run. Raises ValueError for degrees that don't fit each other."""

    model: Model
    sequence: int = 4096
    micro_batch: int = 1
    """Sequences of one micro-batch."""
    micro_batches: int = 1
    """How many micro-batches a step accumulates on each data-parallel rank."""
    tp: int = 1
    """Tensor parallel ranks, with sequence parallelism; of one node."""
    pp: int = 1
    """Pipeline stages, one forward and one backward in turn."""
    stages_in_turn: int = 1
    """Into how many pieces the layers of a rank's stage are cut, so that a pipeline fills and drains as much faster
    (Megatron's virtual pipeline)."""
    ep: int = 1
    """Expert parallel ranks."""
    recompute: Recompute = "none"
    dtype: str = "bf16"
    """Of products, and of all that is kept or sent; with fp8 the latter stays in bf16."""
    wire_dtype: str | None = None
    """How rows travel in the forward's dispatch, fp8 with a scale for each 128 columns; None: in dtype."""
    expert_precision: str | None = None
    """The format of an ExpertPrecision in which the experts train; gradients of their weights are products in bf16."""
    two_batches: bool = False
    """Whether two halves of a micro-batch run in turn, each under the other's exchanges. In Megatron two micro-batches
    do, the forward of one and the backward of another (--overlap-moe-expert-parallel-comm)."""
    cuda_graphs: bool = False
    """Whether a layer is launched from CUDA graphs, in part at least, by a host that waits for no counts (HybridEP)."""
    overlaps_reduction: bool = True
    """Whether gradients are summed over data-parallel ranks while the last micro-batch's backward still runs, as
    DistributedDataParallel and FSDP do."""
    sends_pairs: bool = False
    """Whether every pair travels as a row of its own, as in libraries that send a token once for each expert."""
    pair_passes: float = 0.0
    """How often every pair's row of D columns is read or written in a layer's forward and backward by kernels that only
    move or scale it. Those of this package do none; where permutations, padding and gates run apart, some tens."""
    trainer: str = "ours"
    """Whose code this is, a key of trainer.TRAINERS; its name only: what it does stands in the settings beside it."""
    overlaps_exchange: bool = True
    """Whether exchanges may run under the experts of other chunks."""
    zero: int = 1
    """1: the optimizer's state is spread over data-parallel ranks; 3: weights and gradients too. A stage of a pipeline
    then gathers its weights once a step, and sums its gradients once, as FSDP2 does under torch's pipelines."""
    us_per_expert: float = 0.0
    """What the host needs for each expert of a layer and each pass, where experts aren't spread and run one by one."""
    imbalance: float = 1.0
    """The pairs of the busiest rank over the mean, where `load` doesn't say them: experts and exchanges take so many
    times as long."""
    load: tuple[float, ...] = ()
    """The share of all pairs that each expert gets, as recorded; () is uniform routing."""
    frozen: str | None = None
    """How the experts of a frozen model are stored, one of FROZEN: adapters of its experts are all that trains. None:
    everything trains."""
    adapter_rank: int = 0
    """R of the adapters on both projections of every expert of a frozen model."""

    def __post_init__(self) -> None:
        for name in ("sequence", "micro_batch", "micro_batches", "tp", "pp", "stages_in_turn", "ep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.model.num_experts % self.ep:
            raise ValueError(f"{self.model.num_experts} experts can't be shared evenly by ep={self.ep} ranks")
        if self.pp > self.model.num_layers:
            raise ValueError(f"pp={self.pp} stages are more than {self.model.num_layers} layers")
        if self.recompute not in get_args(Recompute):
            raise ValueError(f"recompute must be one of {', '.join(get_args(Recompute))}, got {self.recompute!r}")
        if self.imbalance < 1:
            raise ValueError(f"imbalance is the busiest rank's load over the mean, at least 1, got {self.imbalance}")
        if self.zero not in (1, 3):
            raise ValueError(f"zero must be 1 (the optimizer's state is spread) or 3 (weights too), got {self.zero}")
        if self.pp * self.stages_in_turn > self.model.num_layers:
            raise ValueError(
                f"pp={self.pp} stages of {self.stages_in_turn} pieces are more than {self.model.num_layers} layers"
            )
        self._check_precision()
        for dtype in (self.dtype, self.wire_dtype):
            if dtype is not None and dtype not in DTYPE_BYTES:
                raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
        if self.num_tokens < 1:
            raise ValueError(f"{self.sequence} x {self.micro_batch} tokens are fewer than tp={self.tp} ranks")
        if self.two_batches and self.micro_batch < 2 and not (self.runs_batches_in_turn and self.micro_batches > 1):
            raise ValueError(
                "two_batches runs the sequences of a micro-batch in two halves: micro_batch must be at least 2, got "
                f"{self.micro_batch} (--micro-batch 2). Megatron takes two micro-batches: give it more than one "
                "(--trainer megatron --micro-batches 8)"
            )
        self._check_frozen()

    def _check_precision(self) -> None:
        if self.expert_precision is None:
            return
        if self.expert_precision not in BLOCKS:
            raise ValueError(f"expert_precision must be one of {', '.join(BLOCKS)}, got {self.expert_precision!r}")
        others = {"dtype": "bf16", "wire_dtype": None, "frozen": None, "trainer": "ours"}
        wrong = [f"{name}={getattr(self, name)!r}" for name, value in others.items() if getattr(self, name) != value]
        if wrong:
            raise ValueError(
                f"experts in {self.expert_precision} have rows and weights of bf16 that this package trains, and rows "
                f"travel as their codes: leave {', '.join(wrong)} out, or expert_precision"
            )

    def _check_frozen(self) -> None:
        if self.frozen is None:
            if self.adapter_rank:
                raise ValueError(
                    f"adapters of rank {self.adapter_rank} are trained on a frozen model: say how its experts are "
                    "stored (--frozen bf16), or leave the rank out"
                )
            return
        if self.frozen not in FROZEN:
            raise ValueError(f"frozen must be one of {', '.join(FROZEN)}, got {self.frozen!r}")
        if self.adapter_rank < 1:
            raise ValueError(
                f"of a frozen model ({self.frozen}) only adapters train: adapter_rank must be at least 1, got "
                f"{self.adapter_rank} (--adapter-rank 16)"
            )
        if self.dtype != "bf16" or self.trainer != "ours":
            raise ValueError(
                "a frozen model is predicted with rows of bf16, as this package trains its adapters: leave "
                f"dtype={self.dtype!r} and trainer={self.trainer!r} out, or frozen"
            )
        if self.packed_format is not None:
            width, depth, packed = self.model.expert_size, self.model.hidden_size, find_format(self.packed_format)
            if width % packed.block_rows:
                raise ValueError(
                    f"{self.model.name} has experts of F = {width}, which is not a multiple of {packed.block_rows}, as "
                    f"{packed.name} asks for: use mxfp4 or nf4"
                )
            for shape in ((1, 2 * width, depth), (1, depth, width)):
                packed.scales_shape(shape)

    @property
    def runs_batches_in_turn(self) -> bool:
        """Whether two micro-batches run in turn, instead of two halves of one."""
        return self.two_batches and self.trainer == "megatron"

    @property
    def num_tokens(self) -> int:
        """T: the tokens of a micro-batch that a rank has where they are shared by its tensor-parallel ranks."""
        return self.sequence * self.micro_batch // self.tp

    @property
    def dtype_bytes(self) -> int:
        """The bytes of an element of rows and weights."""
        return DTYPE_BYTES[self.dtype]

    @property
    def wires(self) -> Wires:
        """How rows travel, but for headers."""
        wire_dtype = torch.float8_e4m3fn if self.wire_dtype == "fp8" else None
        return choose_wires(ROW_DTYPES[self.dtype], wire_dtype, self.precision)

    @property
    def precision(self) -> ExpertPrecision | None:
        """The ExpertPrecision of the experts; None where they have none."""
        form: Any = self.expert_precision
        return None if form is None else ExpertPrecision(form)

    @property
    def packed_format(self) -> WeightFormat | None:
        """The format of experts that are stored in 4 or 8 bits; None for plain ones."""
        return next((name for name in FORMATS if name == self.frozen), None)

    @property
    def expert_bytes(self) -> float:
        """The bytes of a value of an expert's weight, its share of a scale included."""
        return self.dtype_bytes if self.packed_format is None else find_format(self.packed_format).bytes_per_value

    @property
    def expert_adapters(self) -> int:
        """The parameters of one expert's adapters."""
        return self.model.adapter_parameters(self.adapter_rank)

    def stage_layers(self) -> list[tuple[int, int]]:
        """Return (dense layers, layers with experts) of every pipeline stage; the first may have one more."""
        each, more = divmod(self.model.num_layers, self.pp)
        stages, first = [], 0
        for stage in range(self.pp):
            last = first + each + (stage < more)
            num_dense = max(0, min(last, self.model.num_dense_layers) - first)
            stages.append((num_dense, last - first - num_dense))
            first = last
        return stages

    def rank_parameters(self, stage: int) -> tuple[float, float]:
        """Return how many parameters a rank of a stage has: those of all data-parallel ranks, and its experts'."""
        model = self.model
        num_dense, num_sparse = self.stage_layers()[stage]
        shared = (num_dense * model.dense_parameters + num_sparse * model.attention_parameters) / self.tp
        shared += num_sparse * (model.other_parameters - model.attention_parameters)
        ends = (stage == 0) + (stage == self.pp - 1 and not (model.is_tied and self.pp == 1))
        shared += ends * model.vocab_size * model.hidden_size / self.tp
        return shared, num_sparse * model.num_experts / self.ep * model.expert_parameters

    def trained_parameters(self, stage: int) -> tuple[float, float]:
        """Return those of rank_parameters() that are trained: of a frozen model its adapters instead."""
        if self.frozen is None:
            return self.rank_parameters(stage)
        return 0.0, self.stage_layers()[stage][1] * self.model.num_experts / self.ep * self.expert_adapters

    def weight_bytes(self, shared: float, experts: float) -> tuple[float, float]:
        """Return the bytes of so many parameters of both kinds, and of the adapters of so many experts."""
        adapters = experts / self.model.expert_parameters * self.expert_adapters
        return shared * self.dtype_bytes, experts * self.expert_bytes + adapters * self.dtype_bytes

    def dp(self, cluster: Cluster) -> int:
        """Return the number of data-parallel ranks; ValueError where the GPUs can't be shared so."""
        ranks, rest = divmod(cluster.num_gpus, self.tp * self.pp)
        if rest or not ranks:
            raise ValueError(f"{cluster.num_gpus} GPUs can't be shared by tp={self.tp} x pp={self.pp}")
        if self.tp > cluster.gpus_per_node:
            raise ValueError(f"tp={self.tp} ranks are more than a node's {cluster.gpus_per_node} GPUs")
        if ranks * self.tp % self.ep:
            raise ValueError(f"{ranks * self.tp} ranks of a pipeline stage can't be shared by ep={self.ep}")
        if self.ep % cluster.gpus_per_node and cluster.gpus_per_node % self.ep:
            raise ValueError(f"ep={self.ep} ranks are neither whole nodes of {cluster.gpus_per_node} nor a part of one")
        return ranks

    def tokens_per_step(self, cluster: Cluster) -> int:
        return self.sequence * self.micro_batch * self.micro_batches * self.dp(cluster)

    def peak_flops(self, cluster: Cluster, *, is_wide: bool = False) -> float:
        """Return the peak FLOP/s of products in this dtype; ValueError where the cluster doesn't say.

        is_wide: of what is bf16 beside products in fp8: attention, router, output layer.
        """
        dtype = "bf16" if is_wide and self.dtype == "fp8" else self.dtype
        peak = cluster.gpu.tflops.get(dtype)
        if peak is None:
            known = ", ".join(cluster.gpu.tflops)
            raise ValueError(
                f"{cluster.name} has no rate of products in {dtype}: add it to gpu.tflops, which has {known}"
            )
        return peak * 1e12

    def expert_peak_flops(self, cluster: Cluster) -> float:
        """Return the peak FLOP/s of the experts' products, but for those that give gradients of weights.

        Raises:
            ValueError: the cluster doesn't say; or its GPUs have no instruction for the precision.
        """
        if self.expert_precision is None:
            return self.peak_flops(cluster)
        peak = cluster.gpu.tflops.get(self.expert_precision)
        if peak is None:
            raise ValueError(
                f"{cluster.name} has no rate of products of {self.expert_precision}'s codes. A GPU without an "
                "instruction for them computes in bf16, and takes longer than without the precision: leave "
                "expert_precision out, or, if the GPU has one (`tritonmoe env` shows it), add its rate to gpu.tflops"
            )
        return peak * 1e12


def expert_degrees(job: Job, cluster: Cluster) -> list[int]:
    """Return every number of expert-parallel ranks that fits the job and the cluster, ascending."""
    degrees = []
    for ep in range(1, job.model.num_experts + 1):
        if job.model.num_experts % ep == 0:
            try:
                replace(job, ep=ep).dp(cluster)
            except ValueError:
                continue
            degrees.append(ep)
    return degrees


UNKNOWN_IMBALANCE = 1.2
"""Job.imbalance of routing that nobody recorded or forced to be balanced; of fine-tuning 2.6 to 5.1 was published."""

Sends = Literal["rows", "pairs"]
"""Whether a token travels once to each rank that needs it, or once for each of its experts."""


@dataclass(frozen=True)
class Trainer:
    """A library that trains models with experts, as it is used by default."""

    sends: Sends
    overlaps_exchange: bool
    """Whether exchanges run under the experts of other chunks."""
    zero: int
    """As Job.zero."""
    pair_passes: float
    """Job.pair_passes where pairs travel; where rows do, the library that sends them permutes too, in half as many."""
    us_per_expert: float
    """Job.us_per_expert."""


TRAINERS = {
    "ours": Trainer("rows", True, 1, 0.0, 0.0),
    "megatron": Trainer("pairs", False, 1, 12.0, 0.0),
    "torchtitan": Trainer("pairs", False, 3, 48.0, 0.0),
    "deepspeed": Trainer("pairs", False, 3, 24.0, 2500.0),
}
"""Passes: permute, pad, scale and cast, and back, forward and backward, are 12 where kernels are fused, as recipes for
Megatron have them, to 48 where none is, as in torchtitan. Microseconds an expert: DeepSpeed gathers the weights of a
model's experts one by one where it doesn't spread the experts; published steps say 2 to 5 ms for each."""


def trained_by(job: Job, name: str, sends: Sends | None = None, zero: int | None = None) -> Job:
    """Return the job as a trainer runs it.

    sends, zero: instead of what the trainer does by default, such as "rows" for Megatron with DeepEP.
    Raises:
        ValueError: there is no such trainer, or it doesn't do that.
    """
    if name not in TRAINERS:
        raise ValueError(f"trainer must be one of {', '.join(TRAINERS)}, got {name!r}")
    of = TRAINERS[name]
    sends = of.sends if sends is None else sends
    if sends not in get_args(Sends):
        raise ValueError(f"sends must be one of {', '.join(get_args(Sends))}, got {sends!r}")
    if name == "ours" and sends != "rows":
        raise ValueError(
            "this package sends every row once to each rank that needs it: leave sends='pairs' out, or name another "
            "trainer"
        )
    return replace(
        job,
        trainer=name,
        sends_pairs=sends == "pairs",
        overlaps_exchange=of.overlaps_exchange,
        zero=of.zero if zero is None else zero,
        pair_passes=of.pair_passes / (1 if sends == "pairs" else 2),
        us_per_expert=of.us_per_expert,
    )
