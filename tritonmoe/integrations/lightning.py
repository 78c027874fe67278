"""Lightning: `Trainer(strategy=ExpertParallelStrategy())` spreads the experts of a module over all its processes.

Everything else is as under DistributedDataParallel. Lightning imports nothing of this.
"""

from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.strategies import DDPStrategy

from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.integrations.torch_distributed.parallelize import gather_state_dicts
from tritonmoe.integrations.transformers.parallelize_model import parallelize
from tritonmoe.placement.data_parallel import name_ignored
from tritonmoe.placement.expert_shards import sharded_modules
from tritonmoe.placement.whole_states import gather_optimizer
from tritonmoe.transports import as_transport
from tritonmoe.transports.torch_groups import own_group

if TYPE_CHECKING:
    import lightning

__all__ = ["ExpertParallelStrategy"]


class ExpertParallelStrategy(DDPStrategy):
    """DistributedDataParallel with the experts of the module spread over all processes, each on one of them.

    Lightning makes the module as for "ddp", with the same weights in every process; before it makes the optimizers, the
    experts of its models of transformers and MoELayers are spread. Checkpoints are files of whole weights and optimizer
    states, which load over any number of processes, and with load_from_checkpoint in one.

    Args:
        overlap: the chunks of exchanges; None is OverlapConfig().
        expert_gradients: "mean" over the processes, as those of all other weights, or "sum".
        ddp: what DDPStrategy takes.
    Raises:
        ValueError: processes that are forked or spawned, or averages of models.
    """

    strategy_name = "tritonmoe"

    def __init__(
        self,
        overlap: OverlapConfig | None = None,
        *,
        expert_gradients: Literal["mean", "sum"] = "mean",
        **ddp: Any,
    ) -> None:
        start_method = ddp.get("start_method", "popen")
        if start_method != "popen":
            raise ValueError(
                f"start_method={start_method!r} sends the first process's state dict back, and every process gathers "
                'spread experts for one: leave it "popen", or start with torchrun'
            )
        if ddp.get("model_averaging_period") is not None:
            raise ValueError(
                "model_averaging_period averages all weights over the processes, and experts are other ones in each: "
                "leave it out"
            )
        super().__init__(**ddp)
        self._overlap = overlap
        self._expert_gradients: Literal["mean", "sum"] = expert_gradients

    def model_to_device(self) -> None:
        """Move the module to its device, and spread its experts once."""
        super().model_to_device()
        module = self.lightning_module
        assert module is not None
        if not any(sharded_modules(module)):
            parallelize(module, own_group(None), self._overlap, expert_gradients=self._expert_gradients)
            gather_state_dicts(module)
        name_ignored(module)  # without training Lightning broadcasts weights itself

    def setup_optimizers(self, trainer: "lightning.Trainer") -> None:
        """Make the optimizers, whose state dicts are whole."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            gather_optimizer(optimizer)

    def process_dataloader(self, dataloader: object) -> object:
        """Return the loader itself.

        Raises:
            ValueError: the processes have other numbers of batches, and one would wait for the experts of another.
        """
        try:
            number = len(dataloader)  # type: ignore[arg-type]
        except TypeError:  # an endless one, or of a number that nobody knows
            number = -1
        of_all = as_transport(own_group(None)).share_number(number)
        if len(set(of_all)) > 1:
            raise ValueError(
                f"the processes have {of_all} batches, and each layer of experts waits for all processes: give them "
                "as many by a sampler of your own, with use_distributed_sampler=False; Lightning's own for "
                "predict() repeats no sample, so take a number that the processes can divide"
            )
        return dataloader
