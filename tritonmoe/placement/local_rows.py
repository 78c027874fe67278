"""local_rows: the memory of this rank's experts in a parameter, its gradient or a state of its optimizer."""

from torch import Tensor, nn, strided

__all__ = ["local_rows"]


def local_rows(what: str, tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's memory of a tensor with the experts in its first dimension, as the parameter has them.

    It is not detached: autograd is to see that a forward's weights have changed before its backward.

    Raises:
        ValueError: it doesn't lie as a parameter of spread experts does.
    """
    shape = tuple(parameter.shape)
    if hasattr(parameter, "to_local"):
        from torch.distributed.tensor import Shard

        if tuple(getattr(parameter, "placements", ())) != (Shard(0),):
            raise ValueError(
                f"{what} lies as {getattr(parameter, 'placements', None)}, so it is sharded over replicas too, and "
                "only whole experts can move: leave the experts out of fully_shard "
                "(ignored_params=set(tritonmoe.expert_parameters(model)))"
            )
        if hasattr(tensor, "to_local"):
            lies = tuple(getattr(tensor, "placements", ()))
            if lies != (Shard(0),):
                raise ValueError(
                    f"{what} lies as {lies}, not like its parameter, and tm.rebalance can move only states that lie "
                    "like the parameter: take an optimizer whose states are like the parameter (AdamW, SGD, Adagrad)"
                )
            local = tensor.to_local() if tensor.shape[0] == shape[0] else None
        else:
            local = tensor if tensor.shape == parameter.to_local().shape else None
    else:
        is_by_expert = tensor.dim() and tensor.shape[0] == shape[0]
        # Experts by experts, as a preconditioner of the first dimension is, and no dimension of the weight's own.
        is_of_pairs = shape[0] > 1 and shape[0] in tensor.shape[1:] and shape[0] not in shape[1:]
        local = tensor if is_by_expert and not is_of_pairs else None
    if local is None or type(local) not in (Tensor, nn.Parameter) or local.layout != strided:
        raise ValueError(
            f"{what} is a {type(tensor).__name__} {tuple(tensor.shape)} for a parameter {shape}, and tm.rebalance "
            "can't tell which part belongs to an expert: it moves tensors with the experts in their first dimension, "
            "as the states of AdamW, SGD and Adagrad have"
        )
    return local
