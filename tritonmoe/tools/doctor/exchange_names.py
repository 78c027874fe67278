"""How libraries call their exchanges, in kernels, operators and records, old and new: one word for each kind."""

import re

__all__ = ["ELEMENT_BYTES", "SYMMETRIC", "as_run", "kind_of_kernel", "kind_of_name", "kind_of_operator"]

KINDS = (
    # what the name has, without underscores and in small letters, and the kind; the first that fits
    ("reducescatter", "reduce_scatter"), ("allreduce", "all_reduce"), ("allgather", "all_gather"),
    ("alltoall", "all_to_all"), ("all2all", "all_to_all"), ("sendrecv", "all_to_all"), ("broadcast", "broadcast"),
    ("barrier", "barrier"), ("scatter", "scatter"), ("gather", "gather"), ("reduce", "reduce"),
    ("send", "send"), ("recv", "recv"),
)  # fmt: skip
SYMMETRIC = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "barrier", "notify"}
"""None of their ranks ends before the last one has started."""
ROWS_LIBRARIES = re.compile(r"deep_ep|hybrid_ep|nccl_ep|\b(?:internode|intranode|internode_ll)::|uccl_ep|mori::")
ROWS_KERNELS = (
    ("notify", "notify"), ("cachednotify", "notify"), ("dispatch", "dispatch"), ("combine", "combine"),
    ("barrier", "barrier"),
)  # fmt: skip
ELEMENT_BYTES = {
    "float": 4, "double": 8, "half": 2, "bfloat16": 2, "long": 8, "long int": 8, "int": 4, "short": 2, "char": 1,
    "signed char": 1, "unsigned char": 1, "byte": 1, "bool": 1, "c10::half": 2, "c10::bfloat16": 2,
    "c10::float8_e4m3fn": 1, "c10::float8_e5m2": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1, "uint8": 1,
    "int32": 4, "int64": 8, "float16": 2, "float32": 4, "float64": 8, "complexfloat": 8, "c10::complex<float>": 8,
}  # fmt: skip


def as_run(kind: str) -> str:
    """Return the kind as which gloo runs an exchange: it has no reduce-scatter of its own."""
    return "all_reduce" if kind == "reduce_scatter" else kind


def kind_of_name(name: str) -> str | None:
    """Return the kind of an exchange that is called so, as "nccl:all_to_all" or "_allgather_base"; None for others."""
    word = re.sub(r"[^a-z0-9]", "", name.lower())
    return next((kind for part, kind in KINDS if part in word), None)


def kind_of_kernel(name: str) -> str | None:
    """Return the kind of exchange that a GPU's kernel is: NCCL's and RCCL's, and those of rows' libraries."""
    lower = name[:200].lower()
    if ROWS_LIBRARIES.search(lower):
        word = lower.replace("_", "")
        return next((kind for part, kind in ROWS_KERNELS if part in word), None)
    if (
        lower.startswith(("nccl", "rccl", "void nccl", "void rccl"))
        or "nccldevkernel" in lower
        or "ncclkernel" in lower
    ):
        return kind_of_name(lower.partition("(")[0]) or "exchange"
    return None


def kind_of_operator(name: str) -> str | None:
    """Return the kind of exchange that an operator of PyTorch hands over; None for others."""
    if name.startswith("c10d::"):
        return kind_of_name(name[6:])
    return None
