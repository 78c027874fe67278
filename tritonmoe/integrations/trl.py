"""TRL: ReplayedRouting, by which a GRPOTrainer trains with the routing of the rollout. It imports no TRL by itself."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tritonmoe.routing.recording import RoutingRecording

if TYPE_CHECKING:
    from trl import GRPOTrainer

    from tritonmoe.integrations.transformers.routing_replay import ReplayCounts
else:
    GRPOTrainer = object  # what a class puts behind this mixin

__all__ = ["ReplayedRouting"]

KEY = "routed_experts"
"""What rollout_func calls the routing of its sequences, and what it is called in TRL's batches."""


class ReplayedRouting(GRPOTrainer):
    """Before GRPOTrainer in the bases of a class: the policy takes the experts that the rollout took (R3).

    Without `rollout_func`, the routing of the trainer's own generate() is recorded. A `rollout_func` returns it beside
    the completions, as "routed_experts": for each sequence what RoutingRecording.from_rollout takes, as vLLM and SGLang
    give it. It goes through TRL's shuffling and micro-batches with its sequence, and the policy's forwards replay it,
    for old and new log-probabilities, also of a model whose experts are spread over ranks. The reference model chooses
    for itself.

    TRL's logs get two metrics more, of the forwards of each loss on all ranks: routing_replay/replayed_tokens_ratio,
    the share of tokens whose experts were replayed, and routing_replay/changed_pairs_ratio, the share of their pairs (a
    token and one of its experts) whose experts the router itself would not have chosen.

    Raises:
        ValueError: where TRL drops the routing or would mix it up: vLLM without a rollout_func, continuous batching,
            tools and environments, images; rows that are missing, of other layers, or shifted by one token, on every
            rank. A micro-batch of each generation is compared with the model's own choice for that.
    Example:
        class Trainer(ReplayedRouting, GRPOTrainer): ...
        Trainer(model, reward_funcs=reward, args=GRPOConfig(...), train_dataset=dataset).train()
    """

    has_experts: Sequence[bool] | None = None
    """For each layer in the engine's rows whether it has experts, where dense layers have (meaningless) ids too."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self._rollout: list | None = None
        """The routing of the sequences that are being generated, or are being scored."""
        self._like: RoutingRecording | None = None
        self._counts: list[Tensor] = []
        """(4,) int64 of each forward of the policy in this loss: tokens times layers, how many of them were replayed,
        their pairs, and how many of these would have gone elsewhere."""
        super().__init__(*args, **kwargs)
        self._refuse_what_drops_routing()

    def _refuse_what_drops_routing(self) -> None:
        for is_used, what in (
            (self.use_vllm and self.rollout_func is None, "use_vllm without a rollout_func"),
            (self.use_transformers_continuous_batching, "use_transformers_continuous_batching"),
            (bool(self.tools) or self.environment_factories is not None, "tools or environment_factory"),
            (self._is_vlm, "a model that takes images"),
        ):
            if is_used:
                raise ValueError(
                    f"{what}: TRL keeps no routing there that could be replayed. Generate in a rollout_func that "
                    f'returns "{KEY}", or with generate() of the model; or leave ReplayedRouting out'
                )

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: object, **kwargs: object) -> tuple:
        """Generate, and keep the routing of every sequence."""
        from tritonmoe.integrations.transformers.routing_replay import record_routing

        with record_routing(self._policy()) as recording:
            completion_ids, log_probs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self._rollout = _rows(recording, [len(ids) for ids in prompt_ids], [len(ids) for ids in completion_ids])
        return completion_ids, log_probs

    def _generate(self, prompts: list) -> tuple:
        """Generate, take the routing out of what rollout_func gave, and refuse what can't be that of its tokens."""
        self._rollout = None
        generated = super()._generate(prompts)
        prompt_ids, completion_ids, extra_fields = generated[0], generated[1], generated[5]
        error: ValueError | TypeError | None = None
        if self.rollout_func is not None:
            self._rollout = extra_fields.pop(KEY, None)
        try:
            self._check(prompt_ids, completion_ids)
        except (ValueError, TypeError) as caught:
            error = caught
        num_failed = self.accelerator.reduce(torch.tensor(int(error is not None), device=self.accelerator.device))
        if error is not None:
            raise error
        if num_failed.item():
            raise ValueError("the routing of another rank's rollout can't be replayed: its own error says why")
        return generated

    def _generate_and_score_completions(self, inputs: list) -> dict[str, object]:
        """Score with the routing in place, and send it with its sequences through shuffling and micro-batches."""
        try:
            output = super()._generate_and_score_completions(inputs)
            return {**output, KEY: self._rollout}
        finally:
            self._rollout = None

    def compute_loss(self, model: nn.Module, inputs: dict, *args: object, **kwargs: object) -> object:
        """Compute the loss with the routing of these sequences, and log how much was replayed."""
        self._rollout, self._counts = inputs[KEY], []
        try:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self._rollout = None
        self._log_counts()
        return loss

    def _log_counts(self) -> None:
        """Log, of all ranks, the share of tokens that were replayed, and that of pairs that replay has changed."""
        counts = torch.stack([*self._counts, torch.zeros(4, dtype=torch.long, device=self.accelerator.device)]).sum(0)
        num_tokens, num_replayed, num_pairs, num_changed = self.accelerator.reduce(counts).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, count, of in (
            ("replayed_tokens_ratio", num_replayed, num_tokens),
            ("changed_pairs_ratio", num_changed, num_pairs),
        ):
            metrics[f"routing_replay/{name}"].append(count / of if of else math.nan)  # TRL leaves NaN out

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: object,
    ) -> tuple:
        """Compute log-probabilities, of the policy with the experts of the rollout."""
        with self._replay(model, input_ids, attention_mask, logits_to_keep, batch_size or len(input_ids)):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs
            )

    def _replay(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: int
    ) -> AbstractContextManager[None]:
        from tritonmoe.integrations.transformers.routing_replay import replay_routing

        if self._rollout is None or self._like is None or self._is_reference(model):
            return nullcontext()
        prompt_mask = attention_mask[:, :-logits_to_keep]  # not the completion's: truncated ones are masked there
        mask = _token_mask(prompt_mask, self._rollout, logits_to_keep)
        recording = RoutingRecording.from_rollout(self._rollout, mask, self._like)
        index = torch.arange(mask.numel(), device="cpu").view(mask.shape)
        replay = replay_routing(model, recording.rearranged(*index.split(batch_size)))
        return self._counted(replay, (int(mask.sum()) - len(mask)) * len(recording.layers))  # the last is no input

    @contextmanager
    def _counted(self, replay: "AbstractContextManager[ReplayCounts]", num_tokens: int) -> Iterator[None]:
        with replay as counts:
            yield
        found = [counts.num_replayed_tokens, counts.num_pairs, counts.num_changed_pairs]
        self._counts.append(torch.stack([found[0].new_tensor(num_tokens), *found]).to(self.accelerator.device))

    def _is_reference(self, model: nn.Module) -> bool:
        """Return whether it is the reference model, or the policy with its adapters off or exchanged for those."""
        if model is self.ref_model:
            return True
        inside = self.accelerator.unwrap_model(model)
        if getattr(inside, "active_adapter", None) == "ref":
            return True
        return any(getattr(child, "disable_adapters", False) is True for child in inside.modules())

    def _policy(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def _check(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> None:
        """Refuse routing that isn't that of these sequences, and turn it into tensors (rows, layers, K)."""
        sequences = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        compared = sequences[: self.args.per_device_train_batch_size]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(one, device="cpu") for one in compared], batch_first=True)
        mask = nn.utils.rnn.pad_sequence(
            [torch.ones(len(one), dtype=torch.long, device="cpu") for one in compared], batch_first=True
        )
        # before anything is refused: over ranks it is a forward of all of them
        own = self._own_choice(ids.to(self.accelerator.device), mask.to(self.accelerator.device))
        if self._rollout is None or len(self._rollout) != len(completion_ids):
            got = "none" if self._rollout is None else f"{len(self._rollout)} entries"
            raise ValueError(
                f'rollout_func must return "{KEY}", a list with the routing of each of the {len(completion_ids)} '
                f"sequences, got {got}: give the engine's own values, in the form that RoutingRecording.from_rollout "
                "takes"
            )
        RoutingRecording.from_rollout(self._rollout[: len(compared)], mask, own, has_experts=self.has_experts)
        self._like = own
        self._rollout = [
            _as_rows(entry, len(sequence), own, self.has_experts)
            for entry, sequence in zip(self._rollout, sequences, strict=True)
        ]

    def _own_choice(self, ids: Tensor, mask: Tensor) -> RoutingRecording:
        """Return the routing of sequences, padded on the right, by the policy as it is."""
        from tritonmoe.integrations.transformers.routing_replay import record_routing

        with torch.no_grad(), record_routing(self._policy()) as own:
            super()._get_per_token_logps_and_entropies(self.model, ids, mask, 1)
        return own


def _rows(recording: RoutingRecording, prompt_lengths: list[int], completion_lengths: list[int]) -> list[Tensor]:
    """Return (rows, layers, K) of each sequence of a generate(), whose prompts were padded on the left."""
    num_sequences = len(prompt_lengths)
    index = recording.token_index(num_sequences)
    width = recording.num_tokens[0] // num_sequences
    found = []
    for numbers, prompt, completion in zip(index, prompt_lengths, completion_lengths, strict=True):
        own = recording.rearranged(numbers[width - prompt : width + completion - 1])
        found.append(torch.stack([layer.topk_ids.cpu() for layer in own.layers.values()], dim=1))
    return found


def _as_rows(entry: object, num_tokens: int, like: RoutingRecording, has_experts: Sequence[bool] | None) -> Tensor:
    """Return the routing of one sequence, in whatever form it came, as (rows, layers, K)."""
    mask = torch.ones(1, num_tokens, dtype=torch.bool, device="cpu")
    recording = RoutingRecording.from_rollout([entry], mask, like, has_experts=has_experts)
    ids = torch.stack([layer.topk_ids.cpu().short() for layer in recording.layers.values()], dim=1)
    first = next(iter(recording.layers.values()))
    if first.is_recorded is not None:
        ids[~first.is_recorded.cpu()] = -1
    return ids[:-1]  # the last token was never an input


def _token_mask(prompt_mask: Tensor, rollout: Sequence[Tensor], num_completion: int) -> Tensor:
    """Return (B, S) bool of prompts, padded on the left, and completions, padded on the right, by their rows."""
    prompts = prompt_mask.bool().cpu()
    lengths = torch.tensor([len(rows) + 1 for rows in rollout], device="cpu") - prompts.sum(1)
    completions = torch.arange(num_completion, device="cpu") < lengths.unsqueeze(1)
    return torch.cat([prompts, completions], dim=1)
