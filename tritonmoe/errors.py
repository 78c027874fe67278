"""The failures that have a name of their own; bad arguments are plain ValueError and TypeError."""

__all__ = ["CapacityOverflow", "CountMismatch", "NonFiniteScores", "OffloadError", "TransportError"]


class TransportError(RuntimeError):
    """An exchange failed, timed out, or a peer reported an error; the message names rank, peer and splits."""


class CountMismatch(TransportError):
    """The ranks' plans for one call disagree; the message names the ranks and the values."""


class PeerFailure(TransportError):
    """A failure because another rank had failed or refused: never the first cause."""


class CapacityOverflow(RuntimeError):
    """Rows didn't fit into OverlapConfig.capacity where the call couldn't be run again: in a replay of a CUDA graph."""


class NonFiniteScores(RuntimeError):
    """Router scores were NaN or infinite; the message says on which rank and for how many tokens."""


class OffloadError(RuntimeError):
    """An expert that offload_experts() has put into a file could not be read; the message names it and the file."""
