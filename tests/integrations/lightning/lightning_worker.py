"""What every rank runs of Lightning's strategies: `torchrun lightning_worker.py DIRECTORY CASE...`.

Each case compares with one process on the whole batch, trained by a plain loop.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "transformers"))

import lightning
import pytest
import torch
import torch.distributed as dist
from expert_parallel_worker import OVERLAP, assert_close, main, rank, size, whole
from frameworks_worker import Model, data, on_one_device, own_rows, weights
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

import tritonmoe as tm
from tritonmoe.integrations.lightning import ExpertParallelStrategy

FIRST_EPOCH, BOTH_EPOCHS = (0, 1), (0, 1, 0, 1)


class Module(lightning.LightningModule):
    """Knows nothing of ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Model()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(batch[0]).square().mean()

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", self.model(batch[0]).square().mean(), sync_dist=True)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", self.model(batch[0]).square().mean(), sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)


def loader() -> DataLoader:
    """Return this rank's batches of an epoch, after which a run can resume."""
    rows = torch.stack([own_rows(step) for step in range(2)])
    return DataLoader(TensorDataset(rows), collate_fn=lambda items: [items[0][0]])


def trainer(path: Path, num_epochs: int = 1, strategy: Any = None, **settings: Any) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        devices=size,
        strategy=ExpertParallelStrategy(OVERLAP) if strategy is None else strategy,
        max_epochs=num_epochs,
        default_root_dir=path,
        **{"gradient_clip_val": 0.1, "use_distributed_sampler": False, **settings},
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def fit(path: Path, num_epochs: int, **settings: Any) -> tuple[lightning.Trainer, Module]:
    module, own = Module(), trainer(path, num_epochs)
    own.fit(module, loader(), **settings)
    return own, module


def run_trained(name: str, directory: Path) -> None:
    """Clipping, a checkpoint and a resumed run are those of one process."""
    path = directory / "strategy"
    own, module = fit(path, 1)
    spread = [parameter for parameter in module.parameters() if isinstance(parameter, DTensor)]
    assert len(spread) == 2
    assert all(parameter.to_local().numel() * size == parameter.numel() for parameter in spread)
    assert_close(weights(module.model), on_one_device(*FIRST_EPOCH))
    own.save_checkpoint(path / "first.ckpt")
    _, undisturbed = fit(path, 2)
    expected = weights(undisturbed.model)
    assert_close(expected, on_one_device(*BOTH_EPOCHS))
    _, resumed = fit(path, 2, ckpt_path=path / "first.ckpt")
    assert all(torch.equal(value, expected[key]) for key, value in weights(resumed.model).items())
    alone = Module.load_from_checkpoint(path / "first.ckpt")
    assert_close(weights(alone.model), on_one_device(*FIRST_EPOCH))
    own.fit_loop.max_epochs = 2
    own.fit(module, loader())  # the same trainer and module again, with a new optimizer
    assert all(parameter.isfinite().all() for parameter in weights(module.model).values())


def run_goes_on(name: str, directory: Path) -> None:
    """What other numbers of processes have saved goes on here."""
    _, resumed = fit(directory / "strategy", 2, ckpt_path=directory / "strategy" / "first.ckpt")
    assert_close(weights(resumed.model), on_one_device(*BOTH_EPOCHS))
    plain = Module()
    trainer(directory, 2, "ddp").fit(plain, loader(), ckpt_path=directory / "strategy" / "first.ckpt")
    assert_close(weights(plain.model), on_one_device(*BOTH_EPOCHS))


def run_evaluated(name: str, directory: Path) -> None:
    """Without training too, each process keeps its own experts."""
    reference = Module()
    rows = torch.stack([data()[step * len(own_rows(0)) * size :][: len(own_rows(0)) * size] for step in range(2)])
    expected = torch.stack([reference.model(one).square().mean() for one in rows]).mean().item()
    for method in ("test", "validate"):
        module = Module()
        (found,) = getattr(trainer(directory), method)(module, loader(), verbose=False)
        assert abs(found["loss"] - expected) < 1e-5 * abs(expected)
        assert_close(weights(module.model), weights(reference.model))
    predicted = trainer(directory).predict(Module(), loader())
    for step, own in enumerate(predicted):
        assert torch.allclose(own, reference.model(own_rows(step)), atol=1e-6)
    own, module = fit(directory, 1)
    (found,) = own.test(module, loader(), verbose=False)
    trained = Module.load_from_checkpoint(directory / "strategy" / "first.ckpt")
    expected = torch.stack([trained.model(one).square().mean() for one in rows]).mean().item()
    assert abs(found["loss"] - expected) < 1e-5 * abs(expected)


def run_accumulated(name: str, directory: Path) -> None:
    """Micro-batches add up before a step."""
    module = Module()
    trainer(directory, accumulate_grad_batches=2).fit(module, loader())
    assert_close(weights(module.model), one_step_of_two_batches())


def one_step_of_two_batches() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    for step in FIRST_EPOCH:
        number = len(own_rows(0)) * size
        (model(data()[step * number : (step + 1) * number]).square().mean() / 2).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return weights(model)


def run_half(name: str, directory: Path) -> None:
    for precision in ("bf16-true", "bf16-mixed"):
        module = Module()
        trainer(directory, precision=precision).fit(module, loader())
        dtypes = {parameter.dtype for parameter in module.parameters()}
        assert dtypes == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
        for key, expected in on_one_device(*FIRST_EPOCH).items():
            difference = (weights(module.model)[key].float() - expected).norm() / expected.norm()
            assert difference < 0.05, (precision, key, difference)


def run_transformers(name: str, directory: Path) -> None:
    """A model of transformers inside the module, which is saved by its own save_pretrained."""
    from test_families import make_model

    class Causal(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model("mixtral")

        def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
            return self.model(input_ids=ids, labels=ids).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    ids = torch.randint(2, 64, (2, 2, 9), generator=torch.Generator().manual_seed(1))
    module, plain = Causal(), make_model("mixtral")
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(2):
        plain(input_ids=ids[step], labels=ids[step]).loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    batches = [ids[step, rank::size] for step in range(2)]
    trainer(directory).fit(module, DataLoader(batches, batch_size=None))
    assert_close(weights(module.model), weights(plain))
    module.model.save_pretrained(directory / "saved")
    loaded = type(plain).from_pretrained(directory / "saved")
    assert_close(weights(loaded), weights(module.model))


def run_refused(name: str, directory: Path) -> None:
    for wrong, says in (({"start_method": "fork"}, "start_method='fork'"), ({"model_averaging_period": 2}, "averages")):
        with pytest.raises(ValueError, match=says):
            ExpertParallelStrategy(**wrong)
    with pytest.raises(ValueError, match=r"processes have \[3, 2\] batches"):
        trainer(directory, use_distributed_sampler=True).predict(Module(), DataLoader(TensorDataset(data()[:5])))

    class Dense(Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(16, 16)

    with pytest.raises(ValueError, match="no experts"):
        trainer(directory).fit(Dense(), loader())

    class Other(Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(rank)
            self.model = Model()

    with pytest.raises(ValueError, match="with the same seed"):
        trainer(directory).fit(Other(), loader())


def run_sharded(name: str, directory: Path) -> None:
    """Lightning's own ModelParallelStrategy, with FSDP2 beside spread experts: what the page says."""
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    class Sharded(Module):
        def configure_model(self) -> None:
            if not any(isinstance(parameter, DTensor) for parameter in self.parameters()):
                tm.parallelize(self.model, dist.group.WORLD, OVERLAP)
                fully_shard(self.model, ignored_params=set(tm.expert_parameters(self.model)))

    def train(num_epochs: int, **settings: Any) -> tuple[lightning.Trainer, Sharded]:
        strategy = ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1)
        module, own = Sharded(), trainer(directory, num_epochs, strategy)
        own.fit(module, loader(), **settings)
        return own, module

    own, module = train(1)
    assert_close(weights(module.model), on_one_device(*FIRST_EPOCH))
    own.save_checkpoint(directory / "sharded.ckpt")
    _, resumed = train(2, ckpt_path=directory / "sharded.ckpt")
    assert_close(weights(resumed.model), on_one_device(*BOTH_EPOCHS))


def run_by_hand(name: str, directory: Path) -> None:
    """strategy="ddp" around a module that spreads its own experts."""

    class ByHand(Module):
        def __init__(self, is_gathered: bool) -> None:
            super().__init__()
            self.is_gathered = is_gathered
            tm.parallelize(self.model, dist.group.WORLD, OVERLAP)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = super().configure_optimizers()
            if self.is_gathered:
                tm.gather_state_dicts(self, optimizer)
            return optimizer

    for is_gathered in (True, False):
        module, own = ByHand(is_gathered), trainer(directory, 1, "ddp")
        own.fit(module, loader())
        assert_close(weights(module.model), on_one_device(*FIRST_EPOCH))
        if is_gathered:
            own.save_checkpoint(directory / "by_hand.ckpt")
            loaded = torch.load(directory / "by_hand.ckpt", weights_only=False)["state_dict"]
            state = {key.removeprefix("model."): value for key, value in loaded.items()}
            assert_close({key: whole(value) for key, value in state.items()}, on_one_device(*FIRST_EPOCH))
        elif rank == 0:
            with pytest.raises(ValueError, match="gather_state_dicts"):
                own.save_checkpoint(directory / "refused.ckpt")


def run_fabric(name: str, directory: Path) -> None:
    """Adapters of spread experts under Fabric: refused with the way out, which saves them whole; loaded again."""
    from expert_parallel_worker import batch, make_model
    from peft import LoraConfig, get_peft_model

    from tritonmoe.integrations import transformers as tmt

    def make() -> Any:
        torch.manual_seed(1)
        parameters = ["experts.gate_up_proj", "experts.down_proj"]
        config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters)
        model = make_model("mixtral")
        if size > 1:
            tmt.parallelize(model, dist.group.WORLD, OVERLAP)
        return get_peft_model(model, config)

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    fabric = lightning.Fabric(accelerator="cpu", devices=size, strategy="ddp")
    fabric.launch()
    ids, path = batch(2 * size)[2 * rank : 2 * rank + 2], directory / "fabric.ckpt"
    adapters = {"model": lambda key, _: "lora_" in key}
    plain, own = make(), make()
    optimizer = optimizer_of(own)
    if rank == 0:
        with pytest.raises(ValueError, match=r"Fabric.save, call tritonmoe.gather_state_dicts\(module, optimizer\)"):
            torch.save(plain.state_dict(), directory / "refused.ckpt")
    tm.gather_state_dicts(own, optimizer)
    model, wrapped = fabric.setup(own, optimizer)
    for _ in range(2):
        fabric.backward(model(input_ids=ids, labels=ids).loss)
        wrapped.step()
        wrapped.zero_grad()
    fabric.save(path, {"model": model, "optimizer": wrapped}, filter=adapters)
    saved = torch.load(path, weights_only=True)
    assert saved["model"]
    assert all("lora_" in key for key in saved["model"])
    own.save_pretrained(directory / "fabric-adapter")
    from safetensors.torch import load_file

    file = load_file(directory / "fabric-adapter" / "adapter_model.safetensors")
    assert {key.replace(".default", ""): value for key, value in saved["model"].items()}.keys() == file.keys()
    assert all(torch.equal(value, file[key.replace(".default", "")]) for key, value in saved["model"].items())
    again = make()
    other = optimizer_of(again)
    tm.gather_state_dicts(again, other)
    loaded, loaded_optimizer = fabric.setup(again, other)
    fabric.load(path, {"model": loaded, "optimizer": loaded_optimizer}, strict=False)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    for one, its in ((model, wrapped), (loaded, loaded_optimizer)):
        fabric.backward(one(input_ids=ids, labels=ids).loss)
        its.step()
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


CASES = {
    "fabric": run_fabric,
    "trained": run_trained,
    "goes_on": run_goes_on,
    "evaluated": run_evaluated,
    "accumulated": run_accumulated,
    "half": run_half,
    "transformers": run_transformers,
    "refused": run_refused,
    "sharded": run_sharded,
    "by_hand": run_by_hand,
}

if __name__ == "__main__":
    main(CASES)
