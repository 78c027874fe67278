"""flops_per_token: the arithmetic of a training step that a model needs, whatever computes it."""

from tritonmoe.tools.planner.transformer_model import Model

__all__ = ["flops_per_token"]


def flops_per_token(model: Model, sequence: int, adapter_rank: int = 0) -> float:
    """Return the FLOPs of one token's forward and backward, without recomputation: what model FLOP utilisation counts.

    Products with the weights that the token needs, output layer and router among them, and causal attention, of which
    the masked half doesn't count.
    adapter_rank: of adapters on the experts of a frozen model, whose own weights get no gradient; 0: all is trained.
    """
    weights = model.layer_parameters(model.top_k) + model.vocab_size * model.hidden_size
    of_weights = 6.0 * weights
    if adapter_rank:
        num_sparse = model.num_layers - model.num_dense_layers
        of_weights = 4.0 * weights + 6 * num_sparse * model.top_k * model.adapter_parameters(adapter_rank)
    return of_weights + 3 * model.attention_flops(sequence)
