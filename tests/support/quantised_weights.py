"""Stand-ins for the weights of quantisation libraries, which the tests do without."""

from torch import Tensor, nn


class Params4bit(nn.Parameter):
    """Like bitsandbytes': packed bytes with a quant_state."""

    quant_state = "state"


class Int4Tensor(Tensor):
    """Like torchao's: says the dtype of the weight before, and holds something else."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Int4Tensor":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.name() == "aten::detach":  # nn.Parameter does that
            return cls(args[0].inner)
        raise AssertionError(f"{func} touched a quantised weight")
