"""What the arguments of an event in a trace of Kineto say of its exchange: its group, its sizes, who sent what.

They are those of NCCL's kernels and of record_param_comms, or the inputs of a c10d operator.
"""

import math
import re

from tritonmoe.runtime.files import num_elements
from tritonmoe.tools.doctor.exchange_names import ELEMENT_BYTES
from tritonmoe.tools.doctor.trace import Part

__all__ = ["from_nccl", "from_operator", "routed_of"]


def from_nccl(part: Part, arguments: dict) -> bool:
    """Add what NCCL's exchange says of itself; give whether a list in it was cut."""
    name = arguments.get("Process Group Name")
    if isinstance(name, str | int):
        part.group = str(name)
    peer = arguments.get("Dst Rank" if part.kind == "send" else "Src Rank")
    if part.kind in ("send", "recv") and re.fullmatch(r"\d{1,7}", str(peer)):
        part.peer = int(str(peer))
    sequence = arguments.get("Seq")
    if type(sequence) is int:
        part.sequence = sequence
    ranks, is_cut = _whole_numbers(arguments.get("Process Group Ranks", ""))
    size = arguments.get("Group size")
    if ranks and not is_cut and (type(size) is not int or size == len(ranks)):
        part.group_ranks = ranks
    element = ELEMENT_BYTES.get(str(arguments.get("dtype", "")).lower(), 0)
    part.element_bytes = element or None
    elements = arguments.get("In msg nelems")
    if element and type(elements) is int and elements >= 0:
        part.num_bytes = element * elements
    sent, sent_cut = _whole_numbers(arguments.get("In split size", ""))
    received, received_cut = _whole_numbers(arguments.get("Out split size", ""))
    is_cut = is_cut or sent_cut or received_cut
    if (
        sent
        and received
        and not (sent_cut or received_cut)
        and type(size) is int
        and len(sent) == len(received) == size
    ):
        part.rows = sum(received)
        row = part.num_bytes / sum(sent) if part.num_bytes and sum(sent) else 0
        if row:
            part.sent = tuple(int(one * row) for one in sent)
            part.received = tuple(int(one * row) for one in received)
    return is_cut


def from_operator(part: Part, arguments: dict) -> None:
    """Add what an operator's inputs say: sizes, where shapes are recorded, and the splits of an all-to-all."""
    dims, types, inputs = (arguments.get(key) for key in ("Input Dims", "Input type", "Concrete Inputs"))
    if not isinstance(dims, list) or not isinstance(types, list) or len(dims) < 1:
        dims, types = [], []
    tensor = dims[1] if part.kind == "all_to_all" and len(dims) > 1 else dims[0] if dims else None
    while isinstance(tensor, list) and tensor and isinstance(tensor[0], list):
        tensor = tensor[0]
    known = next((ELEMENT_BYTES[str(one).lower()] for one in types if str(one).lower() in ELEMENT_BYTES), None)
    element = 4 if known is None else known
    part.element_bytes = known
    elements = num_elements(tensor)
    if elements is not None:
        part.num_bytes = element * elements
    if part.kind in ("send", "recv") and isinstance(inputs, list) and len(inputs) > 2:
        part.peer = int(inputs[2]) if re.fullmatch(r"\d{1,7}", str(inputs[2])) else None
    if part.kind != "all_to_all" or not isinstance(inputs, list) or len(inputs) < 5:
        return
    received, cut_received = _whole_numbers(inputs[3])
    sent, cut_sent = _whole_numbers(inputs[4])
    if received and len(sent) == len(received) and not (cut_received or cut_sent):
        part.rows = sum(received)
        if isinstance(tensor, list) and tensor and part.num_bytes is not None:
            row = element * math.prod(tensor[1:])
            part.sent, part.received = tuple(one * row for one in sent), tuple(one * row for one in received)


def routed_of(arguments: dict) -> tuple[int, int, int] | None:
    """Return how many dimensions an operator chooses from, how many rows these are, and how many it chooses of each."""
    dims, inputs = arguments.get("Input Dims"), arguments.get("Concrete Inputs")
    sizes = dims[0] if isinstance(dims, list) and dims else None
    chosen = re.fullmatch(r"\d{1,6}", str(inputs[1])) if isinstance(inputs, list) and len(inputs) > 1 else None
    if not isinstance(sizes, list) or len(sizes) < 2 or chosen is None or not num_elements(sizes):
        return None
    return len(sizes), math.prod(sizes[:-1]), int(chosen[0])


def _whole_numbers(text: object) -> tuple[tuple[int, ...], bool]:
    """Return the numbers of a list that was written as text, and whether it was cut."""
    if isinstance(text, list):
        return tuple(one for one in text if type(one) is int), False
    text = str(text)
    return tuple(int(digits) for digits in re.findall(r"\d{1,15}", text)), "..." in text
