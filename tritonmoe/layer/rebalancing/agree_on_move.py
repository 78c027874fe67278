"""agree: the ranks hear whether each of them can move its experts, and whether all would move the same."""

from tritonmoe.errors import PeerFailure
from tritonmoe.placement.expert_shards import Sharding
from tritonmoe.transports import as_transport

__all__ = ["agree"]

REFUSED = -1


def agree(sharding: Sharding, number: int, error: Exception | None) -> None:
    """Raise on every rank where a rank has an error, or another number than the others; every rank calls it.

    Args:
        number: of at least 0, by which ranks know that they would do the same.
    Raises:
        The error on the rank that has one. ValueError: another rank has one, or other numbers.
    """
    transports = [sharding.transport]
    if sharding.replicas is not None:  # and what is found among these goes to all the others
        transports += [as_transport(sharding.replicas), sharding.transport]
    for transport in transports:
        numbers = transport.share_number(number if error is None else REFUSED)
        ranks = transport.job_ranks or range(transport.size)
        refused = [rank for rank, said in zip(ranks, numbers, strict=True) if said == REFUSED]
        others = [rank for rank, said in zip(ranks, numbers, strict=True) if said != numbers[0]]
        if error is None and refused:
            error = ValueError(f"ranks {refused} can't move their experts, so that none does: their own errors say why")
            error.__cause__ = PeerFailure(f"ranks {refused} refused")
        elif error is None and others:
            error = ValueError(
                f"what moves with the experts is not the same on ranks {others} as on rank {ranks[0]} (steps so far, "
                "layers, gradients that are there, or states of optimizers): call step() on every rank behind the same "
                "step, after zero_grad()"
            )
    if error is not None:
        raise error
