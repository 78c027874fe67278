"""StepKind and Step: what a layer call is made of, one thing to do at a time.

A step's kind says all that the executor, the simulator and the reports have to know of it, so that none of them has to
know the kinds by name.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Literal

__all__ = ["LOCAL_END", "LOCAL_NAMES", "LOCAL_START", "Lane", "Step", "StepKind", "Unit", "Way"]

LOCAL_START, LOCAL_END = -2, -1
"""The chunk numbers of the rows that never leave their rank: those that are computed first, and the rest."""
LOCAL_NAMES = {LOCAL_START: "local", LOCAL_END: "local end"}

Lane = Literal["compute", "comm"]


class Unit(Enum):
    """What the cost of a step is counted in: the rows or pairs of its segment on one rank."""

    SENT_ROWS = "rows that this rank sends when tokens go to their experts"
    RETURNED_ROWS = "rows that this rank returns when results go home"
    PAIRS = "routed pairs that this rank computes, those of copies apart where there are such"
    COPY_PAIRS = "those of them that belong to copies of other ranks' experts"
    COPIES = "copies of experts that this rank sends"


class Way(Enum):
    """Which way the rows of an exchange go, or the weights of copied experts and their gradients."""

    TO_EXPERTS = "from the rank that has a token to the ranks that have its experts"
    HOME = "from the ranks that have a token's experts to the rank that has the token"
    TO_COPIES = "from the rank that owns an expert to the ranks that have a copy of it"
    AMONG_COPIES = "from each rank that has a copy of an expert to the others that have one"
    TO_OWNERS = "from the ranks that have a copy of an expert to the rank that owns it"


class StepKind(str, Enum):
    """One kind of step; it is equal to its name, which reports, traces and tables of costs show.

    A kind of the forward and the kind of the backward that returns its gradients are each other's `adjoint`. A kind
    whose name starts with node_ does inside a node what its `twin` does between nodes.
    """

    lane: Lane
    unit: Unit
    way: Way | None
    """None for computation, and for the exchange of gradients between replicas of an expert."""

    def __new__(cls, name: str, lane: Lane, unit: Unit, way: Way | None = None) -> "StepKind":
        kind = str.__new__(cls, name)
        kind._value_ = name
        kind.lane, kind.unit, kind.way = lane, unit, way
        return kind

    # Forward.
    METADATA = "metadata", "comm", Unit.SENT_ROWS, Way.TO_EXPERTS
    """Sends the expert ids and gate weights of all chunks."""
    DISPATCH = "dispatch", "comm", Unit.SENT_ROWS, Way.TO_EXPERTS
    """Sends the rows of a chunk to the ranks that have their experts."""
    FILLER = "filler", "compute", Unit.SENT_ROWS
    """Runs work of the caller's that needs no exchange; its number stands where other steps have their chunk."""
    GROUP = "group", "compute", Unit.PAIRS
    """Sorts all received pairs by chunk and expert."""
    EXPERTS = "experts", "compute", Unit.PAIRS
    """Computes this rank's own experts of a chunk's pairs, and sums them by received row."""
    COMBINE = "combine", "comm", Unit.RETURNED_ROWS, Way.HOME
    """Sends the sums of a chunk's received rows home."""
    REDUCE = "reduce", "compute", Unit.SENT_ROWS
    """Sums what the ranks returned for each token that a chunk completes."""
    COPY_EXPERTS = "copy_experts", "compute", Unit.COPY_PAIRS
    """Computes what copies of other ranks' experts have of a chunk's pairs, and adds it to the chunk's sums."""
    COPIES = "copies", "comm", Unit.COPIES, Way.TO_COPIES
    """Sends the weights of experts that have copies for this call; in a backward once more, where they aren't kept."""
    SPREAD_COPIES = "spread_copies", "comm", Unit.COPIES, Way.AMONG_COPIES
    """Where owners send each copy a piece only: sends these pieces on to the expert's other copies."""
    # Backward.
    COMBINE_BACKWARD = "combine_backward", "comm", Unit.SENT_ROWS, Way.TO_EXPERTS
    """Sends the gradients of a chunk's output to the ranks that have its experts."""
    EXPERTS_BACKWARD = "experts_backward", "compute", Unit.PAIRS
    """Computes the gradients of a chunk's received rows and of their gate weights, over this rank's own experts."""
    COPY_EXPERTS_BACKWARD = "copy_experts_backward", "compute", Unit.COPY_PAIRS
    """Does the same for the pairs that copies have, and adds to them."""
    DISPATCH_BACKWARD = "dispatch_backward", "comm", Unit.RETURNED_ROWS, Way.HOME
    """Sends the gradients of a chunk's received rows home."""
    ROUTING_BACKWARD = "routing_backward", "comm", Unit.SENT_ROWS, Way.HOME
    """Sends the gradients of all gate weights home."""
    WEIGHT_GRAD = "weight_grad", "compute", Unit.PAIRS
    """Computes the gradients of the experts' weights, over all chunks at once."""
    REDUCE_BACKWARD = "reduce_backward", "compute", Unit.SENT_ROWS
    """Sums the gradients that the ranks returned for each token that a chunk completes."""
    REDUCE_ROUTING_BACKWARD = "reduce_routing_backward", "compute", Unit.SENT_ROWS
    """Sums the gradients that the ranks returned for each gate weight."""
    REPLICA_BACKWARD = "replica_backward", "comm", Unit.SENT_ROWS
    """Exchanges the weight gradients of experts of which several ranks have a replica."""
    REDUCE_REPLICA_BACKWARD = "reduce_replica_backward", "compute", Unit.SENT_ROWS
    """Sums the weight gradients of replicas."""
    COPY_WEIGHT_GRAD = "copy_weight_grad", "compute", Unit.COPY_PAIRS
    """Computes a part of the gradients of the weights of copies: 0 of gate_up_proj, 1 of down_proj."""
    COPIES_BACKWARD = "copies_backward", "comm", Unit.COPIES, Way.TO_OWNERS
    """Sends this part to the owners of the experts."""
    REDUCE_COPIES_BACKWARD = "reduce_copies_backward", "compute", Unit.COPIES
    """Adds it to the gradients of the owner's own pairs."""
    # Inside a node, on two levels.
    NODE_METADATA = "node_metadata", "comm", Unit.SENT_ROWS, Way.TO_EXPERTS
    NODE_DISPATCH = "node_dispatch", "comm", Unit.SENT_ROWS, Way.TO_EXPERTS
    NODE_COMBINE = "node_combine", "comm", Unit.RETURNED_ROWS, Way.HOME
    NODE_REDUCE = "node_reduce", "compute", Unit.SENT_ROWS
    NODE_COMBINE_BACKWARD = "node_combine_backward", "comm", Unit.SENT_ROWS, Way.TO_EXPERTS
    NODE_DISPATCH_BACKWARD = "node_dispatch_backward", "comm", Unit.RETURNED_ROWS, Way.HOME
    NODE_REDUCE_BACKWARD = "node_reduce_backward", "compute", Unit.SENT_ROWS
    NODE_ROUTING_BACKWARD = "node_routing_backward", "comm", Unit.SENT_ROWS, Way.HOME
    NODE_REDUCE_ROUTING_BACKWARD = "node_reduce_routing_backward", "compute", Unit.SENT_ROWS

    __str__ = str.__str__

    @classmethod
    def named(cls, name: str) -> "StepKind":
        """Return the kind with this name; ValueError where there is none."""
        return cls(name)  # type: ignore[call-arg]

    @property
    def is_inside_node(self) -> bool:
        return self.name.startswith("NODE_")

    @property
    def twin(self) -> "StepKind":
        """The kind that does the same between nodes; a kind that is not inside a node is its own twin."""
        return StepKind[self.name.removeprefix("NODE_")]

    @property
    def is_of_gradient_part(self) -> bool:
        """Whether its steps have the number of a part of the gradients of copies in the place of a chunk's."""
        return self in (StepKind.COPY_WEIGHT_GRAD, StepKind.COPIES_BACKWARD, StepKind.REDUCE_COPIES_BACKWARD)

    @property
    def copy_kind(self) -> "StepKind | None":
        """The kind that does for copies of experts what this one does for own experts; None without one."""
        return _COPY_KINDS.get(self)

    @property
    def is_sum_of_returned(self) -> bool:
        """Whether it sums, on the rank that has a token, what the other ranks returned."""
        return self.twin.name.startswith("REDUCE")

    @property
    def adjoint(self) -> "StepKind | None":
        """The kind with which the gradients of what this one moves or computes go the other way; None without one."""
        found = _ADJOINTS.get(self.twin)
        if found is None or not self.is_inside_node:
            return found
        return StepKind[f"NODE_{found.name}"]


_PAIRS = (
    (StepKind.METADATA, StepKind.ROUTING_BACKWARD),
    (StepKind.DISPATCH, StepKind.DISPATCH_BACKWARD),
    (StepKind.EXPERTS, StepKind.EXPERTS_BACKWARD),
    (StepKind.COPY_EXPERTS, StepKind.COPY_EXPERTS_BACKWARD),
    (StepKind.COMBINE, StepKind.COMBINE_BACKWARD),
    (StepKind.COPIES, StepKind.COPIES_BACKWARD),
)
_ADJOINTS = {**dict(_PAIRS), **{backward: forward for forward, backward in _PAIRS}}


_COPY_KINDS = {
    StepKind.EXPERTS: StepKind.COPY_EXPERTS,
    StepKind.EXPERTS_BACKWARD: StepKind.COPY_EXPERTS_BACKWARD,
    StepKind.WEIGHT_GRAD: StepKind.COPY_WEIGHT_GRAD,
}


@dataclass(frozen=True)
class Step:
    """One thing to do, for one chunk or for the whole layer."""

    kind: StepKind
    chunk: int | None
    """The number of a chunk, LOCAL_START, LOCAL_END, or None for the whole layer; of a filler, and of a part of the
    gradients of copies, its own number."""
    after: tuple[int, ...] = ()
    """The positions of the earlier steps whose results this one uses."""

    @property
    def lane(self) -> Lane:
        return self.kind.lane

    def segment(self, num_local_slices: int) -> int | None:
        """Return the place of this step's rows in lists by segment, which start with so many local slices.

        It is None for a step that is of all segments.
        """
        if self.chunk is None or self.kind is StepKind.FILLER or self.kind.is_of_gradient_part:
            return None
        return self.chunk + num_local_slices

    def __str__(self) -> str:
        if self.chunk is None:
            return str(self.kind)
        return f"{self.kind} {LOCAL_NAMES.get(self.chunk, self.chunk)}"
