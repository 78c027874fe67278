"""Training on emulated ranks: dense parameters on every rank, experts spread, each rank its own part of the text."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.integrations.torch_distributed.parallelize import expert_parameters
from tritonmoe.tools.demo.model import ByteModel, ModelShape, Text
from tritonmoe.transports import LinkModel, Transport
from tritonmoe.transports.emulated.emulated_ranks import run_on_emulated_ranks

__all__ = ["RankTraining", "Training", "row_bytes_per_layer", "train"]

LEARNING_RATE = 3e-3
WARMUP_STEPS = 10
HELD_OUT_BATCHES = 2
ROW_EXCHANGES = 4
"""The exchanges of rows of a layer in a step: dispatch, combine, and the adjoint of each."""


@dataclass
class Training:
    """What to train, on what and for how long."""

    shape: ModelShape
    text: Text
    num_ranks: int
    device: torch.device
    seed: int
    num_steps: int
    overlap: OverlapConfig
    link: LinkModel | None = None
    time_limit_s: float | None = None
    """Training stops after the step in which a rank has reached it; None is no limit."""
    evaluates: bool = False
    """Whether the loss on the held-out text is taken before the first and after the last step."""


@dataclass
class RankTraining:
    """What one rank saw."""

    mean_losses: list[float] = field(default_factory=list)
    """Nats per byte of each step, averaged over the ranks."""
    own_losses: list[float] = field(default_factory=list)
    """Nats per byte of each step on this rank's batch, without the auxiliary loss."""
    held_out_losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    layer_s: list[float] = field(default_factory=list)
    """Seconds of forward and backward of all MoE layers, for each step."""
    exchanged_bytes: list[int] = field(default_factory=list)
    """Bytes that this step's MoE layers moved in the busier direction of this rank's link, per layer."""
    expert_load: list[int] = field(default_factory=list)
    """(E,) pairs per expert of this rank's tokens, over the MoE layers of the last step."""
    num_parameters: int = 0
    num_expert_parameters: int = 0
    """The parameters of this rank's experts."""


def row_bytes_per_layer(traffic_bytes: Tensor, rank: int) -> int:
    """Return the bytes of a layer's four row exchanges on this rank's link, each in its busier direction."""
    sent, received = int(traffic_bytes[rank].sum()), int(traffic_bytes[:, rank].sum())
    return ROW_EXCHANGES * max(sent, received)


def train(training: Training, on_step: Callable[[int, float], None] | None = None) -> list[RankTraining]:
    """Train from the seed and give what each rank saw; on_step(step, mean loss) is called on rank 0.

    The same seed gives the same losses, bit for bit, whatever the link, and for the serial and overlapped schedule.
    """
    return run_on_emulated_ranks(
        lambda transport: _train_rank(transport, training, on_step),
        training.num_ranks,
        device=training.device,
        link=training.link,
        timeout_s=120.0,
    )


def _train_rank(transport: Transport, training: Training, on_step: Callable[[int, float], None] | None) -> RankTraining:
    rank, size, device = transport.rank, transport.size, training.device
    model = ByteModel(training.shape, transport, training.overlap, seed=training.seed, device=device)
    experts = expert_parameters(model)
    expert_ids = {id(parameter) for parameter in experts}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in expert_ids]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    part = training.text.training.numel() // size
    own_text = training.text.training[rank * part : (rank + 1) * part]
    # Seeds of different runs and ranks must not meet.
    generator = torch.Generator().manual_seed(training.seed * 1009 + rank + 1)
    seen = RankTraining(
        num_parameters=sum(p.numel() for p in dense), num_expert_parameters=sum(p.numel() for p in experts)
    )

    if training.evaluates:
        seen.held_out_losses.append(_held_out_loss(model, transport, training))
    started = time.perf_counter()
    for step in range(training.num_steps):
        step_started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS)
        inputs, targets = _batch(own_text, training.shape, generator, device)
        loss, auxiliary = model(inputs, targets)
        optimizer.zero_grad(set_to_none=True)
        (loss + auxiliary).backward()
        is_late = training.time_limit_s is not None and time.perf_counter() - started > training.time_limit_s
        mean_loss, any_late = _average_gradients(dense, loss.detach(), is_late, transport)
        optimizer.step()

        seen.mean_losses.append(mean_loss)
        seen.own_losses.append(float(loss.detach()))
        reports = [layer.last_report for layer in model.moe_layers]
        passes = [p for report in reports if report is not None for p in (report.forward, report.backward) if p]
        seen.layer_s.append(sum(p.total_s for p in passes))
        seen.exchanged_bytes.extend(row_bytes_per_layer(r.traffic_bytes, rank) for r in reports if r is not None)
        seen.step_s.append(time.perf_counter() - step_started)
        if rank == 0 and on_step is not None:
            on_step(step, mean_loss)
        if any_late:
            break
    loads = [layer.statistics().load for layer in model.moe_layers]
    seen.expert_load = torch.stack(loads).sum(0).tolist()
    if training.evaluates:
        seen.held_out_losses.append(_held_out_loss(model, transport, training))
    return seen


def _average_gradients(
    dense: list[nn.Parameter], loss: Tensor, is_late: bool, transport: Transport
) -> tuple[float, bool]:
    """Average the dense gradients over the ranks; give the mean loss, and whether any rank is late."""
    gradients = [parameter.grad for parameter in dense if parameter.grad is not None]
    assert len(gradients) == len(dense), "every dense parameter takes part in every step"
    # Loss and flag travel with the gradients, so that all ranks stop after the same step.
    extra = torch.stack([loss, torch.full_like(loss, float(is_late))])
    mean = transport.all_reduce(torch.cat([extra, *(gradient.flatten() for gradient in gradients)]), "mean")
    offset = extra.numel()
    for gradient in gradients:
        gradient.copy_(mean[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()
    mean_loss, late = mean[:2].tolist()
    return mean_loss, late > 0


def _batch(text: Tensor, shape: ModelShape, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw sequences from the text: bytes (B, L) and the bytes after them."""
    starts = torch.randint(text.numel() - shape.context, (shape.batch,), generator=generator)
    windows = text[starts[:, None] + torch.arange(shape.context + 1)].long().to(device)
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def _held_out_loss(model: ByteModel, transport: Transport, training: Training) -> float:
    """Return the mean loss on the same held-out sequences at every call, each rank taking a share of them."""
    generator = torch.Generator().manual_seed(transport.rank)
    total = torch.zeros(1, device=training.device)
    for _ in range(HELD_OUT_BATCHES):
        loss, _ = model(*_batch(training.text.held_out, training.shape, generator, training.device))
        total += loss
    return float(transport.all_reduce(total, "mean")) / HELD_OUT_BATCHES
