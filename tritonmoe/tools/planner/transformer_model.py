"""Model: the sizes of a transformer with experts."""

from dataclasses import dataclass, replace

__all__ = ["Attention", "LatentAttention", "Model", "flops_per_token"]


@dataclass(frozen=True)
class Attention:
    """Attention with query heads that share key and value heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def products(self, hidden_size: int) -> list[tuple[int, int]]:
        """Return the (input, output) widths of the projections."""
        kv = self.num_kv_heads * self.head_dim
        queries = self.num_heads * self.head_dim
        return [(hidden_size, queries + 2 * kv), (queries, hidden_size)]

    @property
    def qk_dim(self) -> int:
        return self.head_dim

    @property
    def v_dim(self) -> int:
        return self.head_dim

    @property
    def rope_width(self) -> int:
        """The columns of a token that are rotated, read and written in between."""
        return (self.num_heads + self.num_kv_heads) * self.head_dim

    def up_projections(self, hidden_size: int) -> list[tuple[int, int]]:
        """Return those of the projections that recompute="selective" runs again: none."""
        return []


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek V2 and V3): queries, keys and values come from narrow latents."""

    num_heads: int
    q_rank: int
    """0: queries come from the hidden state itself."""
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int

    def products(self, hidden_size: int) -> list[tuple[int, int]]:
        """Return the (input, output) widths of the projections."""
        down = [(hidden_size, self.q_rank)] if self.q_rank else []
        return [
            *down,
            (hidden_size, self.kv_rank + self.rope_dim),
            *self.up_projections(hidden_size),
            (self.num_heads * self.v_dim, hidden_size),
        ]

    def up_projections(self, hidden_size: int) -> list[tuple[int, int]]:
        """Return the (input, output) widths of those whose results are wide: queries, and keys with values.

        recompute="selective" runs them again, as DeepSeek-V3 was trained and Megatron's mla_up_proj does.
        """
        return [
            (self.q_rank or hidden_size, self.num_heads * self.qk_dim),
            (self.kv_rank, self.num_heads * (self.nope_dim + self.v_dim)),
        ]

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def rope_width(self) -> int:
        """The columns of a token that are rotated or put side by side: queries, keys and values of every head."""
        return self.num_heads * (2 * self.qk_dim + self.v_dim)


@dataclass(frozen=True)
class Model:
    """What decides how much a model computes, sends and holds."""

    name: str
    hidden_size: int
    """D."""
    num_layers: int
    num_dense_layers: int
    """Layers with one feed-forward block of dense_size instead of experts; they come first."""
    attention: Attention | LatentAttention
    num_experts: int
    """E."""
    top_k: int
    """K."""
    expert_size: int
    """F."""
    shared_size: int
    """The width of all shared experts together; 0 for none."""
    dense_size: int
    vocab_size: int
    num_groups: int = 1
    """Experts stand in so many groups ..."""
    top_k_groups: int = 1
    """... of which a token's experts may come from so many."""
    is_tied: bool = False
    """Whether the output layer has the embedding's weights."""
    window: int = 0
    """The tokens that a layer with sliding-window attention sees; 0 where there is none."""
    num_window_layers: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"{self.name}: a token's {self.top_k} experts must be 1 to {self.num_experts} of them")
        if not 0 <= self.num_dense_layers < self.num_layers:
            raise ValueError(
                f"{self.name}: of {self.num_layers} layers {self.num_dense_layers} are dense: no layer has experts"
            )
        groups, chosen = self.num_groups, self.top_k_groups
        if not 1 <= chosen <= groups or self.num_experts % groups or self.top_k > self.num_experts // groups * chosen:
            raise ValueError(
                f"{self.name}: {self.top_k} of {self.num_experts} experts can't come from {chosen} of {groups} groups"
            )

    @property
    def attention_parameters(self) -> int:
        return sum(inputs * outputs for inputs, outputs in self.attention.products(self.hidden_size))

    @property
    def expert_parameters(self) -> int:
        """The parameters of one expert."""
        return 3 * self.hidden_size * self.expert_size

    def adapter_parameters(self, rank: int) -> int:
        """Return the parameters of one expert's adapters of this rank, two factors for each of its projections."""
        return rank * (2 * self.hidden_size + 3 * self.expert_size)

    @property
    def other_parameters(self) -> int:
        """The parameters of a layer with experts that are no experts: attention, router, shared experts."""
        return self.attention_parameters + self.hidden_size * (self.num_experts + 3 * self.shared_size)

    @property
    def dense_parameters(self) -> int:
        """The parameters of a layer without experts: attention and a feed-forward block."""
        return self.attention_parameters + 3 * self.hidden_size * self.dense_size

    def layer_parameters(self, num_experts: int) -> int:
        """Return the parameters of all layers, of so many experts each: those of the model, or those of one token."""
        sparse = self.num_layers - self.num_dense_layers
        of_sparse = self.other_parameters + num_experts * self.expert_parameters
        return sparse * of_sparse + self.num_dense_layers * self.dense_parameters

    @property
    def num_parameters(self) -> int:
        ends = (1 if self.is_tied else 2) * self.vocab_size * self.hidden_size
        return self.layer_parameters(self.num_experts) + ends

    def attention_flops(self, sequence: int) -> float:
        """Return the FLOPs of one token's causal attention in all layers, forward, of which the masked half is none."""
        seen = (self.num_layers - self.num_window_layers) * sequence / 2
        seen += self.num_window_layers * min(self.window, sequence / 2)
        return 2 * seen * self.attention.num_heads * (self.attention.qk_dim + self.attention.v_dim)

    def scaled(self, factor: float) -> "Model":
        """Return a model of another size: D, F and all other widths so many times as large, multiples of 128."""
        if factor == 1:
            return self

        def width(size: int) -> int:
            return max(128, round(size * factor / 128) * 128) if size else 0

        attention = self.attention
        heads = max(1, round(attention.num_heads * factor))
        if isinstance(attention, Attention):
            attention = replace(attention, num_heads=heads, num_kv_heads=min(heads, attention.num_kv_heads))
        else:
            attention = replace(attention, num_heads=heads, q_rank=width(attention.q_rank))
        return replace(
            self,
            name=f"{self.name} x{factor:g}",
            hidden_size=width(self.hidden_size),
            attention=attention,
            expert_size=width(self.expert_size),
            shared_size=width(self.shared_size),
            dense_size=width(self.dense_size),
        )


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
