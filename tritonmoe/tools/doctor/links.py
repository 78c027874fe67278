"""fit_links: latency, rate and slowness of every link, from when the rows of every exchange arrived at every rank.

A message goes out when the ports of both of its ranks have turned to its exchange, and takes as long as the busier of
the two. A port that is slow delays all messages of its rank, a slow link those of one pair of ranks in one direction.
"""

from collections.abc import Sequence

import torch

from tritonmoe.overlap.simulation.cost_model import EachLink, InsidePorts, LinkCosts
from tritonmoe.tools.doctor.link_fit import LEAST_BYTE_S, LinkFit, LinkRatios
from tritonmoe.tools.doctor.messages import Messages, Reach, messages_of, reaches
from tritonmoe.tools.recording.call_recording import RecordedCall, Recording

__all__ = ["fit_links"]

MAX_MESSAGES = 50_000
"""Of more messages than that only those of some passes are looked at."""


def fit_links(calls: Sequence[RecordedCall], recording: Recording) -> tuple[LinkCosts, LinkRatios, tuple[str, ...]]:
    """Find what exchanges cost, in these of its calls; the notes say what could not be found."""
    size, node_size = recording.size, recording.node_size
    passes = [(call, number) for call in calls for number in range(len(call.by_pass))]
    messages = sum(step.step.lane == "comm" for step in calls[0].ranks[0].forward.steps) * size**2
    every = max(1, len(passes) * messages // MAX_MESSAGES) | 1  # odd: of forwards and backwards alike
    fits = {}
    for reach in reaches(node_size):
        sent = Messages.joined([messages_of(call, number, reach, node_size) for call, number in passes[::every]])
        fits[reach] = LinkFit(sent, size, recording.uses_rendezvous)
    notes = []
    if not any(bool(fit.sent.are_known.any()) for fit in fits.values()):
        notes.append("no exchange carried rows from rank to rank")
    elif not any(fit.sent.are_told_apart for fit in fits.values()):
        notes.append("NCCL doesn't tell when each rank's rows arrived: which link or port is slow is not known")
    each, ratios = next(iter(fits.values())).found()
    if node_size is not None:
        near, near_ratios = fits[Reach.INSIDE].found()
        is_near = Reach.INSIDE.pairs(size, node_size)
        each = EachLink(
            each.port_out_s,
            each.port_in_s,
            torch.where(is_near, near.link_s, each.link_s),
            torch.where(is_near, near.latency_s, each.latency_s),
            InsidePorts(node_size, near.port_out_s, near.port_in_s),
        )
        ratios = LinkRatios(
            *(ratios.port_out, ratios.port_in, torch.where(is_near, near_ratios.link, ratios.link)),
            ratios.are_told_apart or near_ratios.are_told_apart,
            torch.where(is_near, near_ratios.excess_s, ratios.excess_s),
            near_ratios.port_out,
            near_ratios.port_in,
        )
    far = next(iter(fits.values()))
    link = LinkCosts(
        *(far.latency_s, 1 / max(far.byte_s, LEAST_BYTE_S), recording.shares_link),
        each=each,
        is_rendezvous=recording.uses_rendezvous,
    )
    return link, ratios, tuple(notes)
