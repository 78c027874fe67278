"""What every rank runs of Accelerate and torch.save: `torchrun frameworks_worker.py DIRECTORY CASE...`.

Each case compares with one process on the whole batch. Rank 0 alone writes what these frameworks save.
"""

import copy
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from expert_parallel_worker import OVERLAP, assert_close, main, rank, size, whole
from expert_parallel_worker import make_model as make_transformers_model
from torch import Tensor, nn

import tritonmoe as tm
from tritonmoe.integrations import transformers as tmt

WIDTH, ROWS, STEPS = 16, 12, 4
CONFIG = tm.MoEConfig(WIDTH, 8, 8, 2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.moe = tm.MoELayer(CONFIG)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(self.first(x))


def make_model(is_spread: bool = True) -> Model:
    torch.manual_seed(0)
    model = Model()
    if is_spread:
        tm.parallelize(model, dist.group.WORLD, OVERLAP)  # with "auto" the bits depend on times
    return model


def data() -> Tensor:
    return torch.randn(STEPS * ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


def own_rows(step: int) -> Tensor:
    return data()[step * ROWS : (step + 1) * ROWS].tensor_split(size)[rank]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}


def on_one_device(*steps: int) -> dict[str, Tensor]:
    model = make_model(is_spread=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    for step in steps:
        rows = data()[step * ROWS : (step + 1) * ROWS]
        model(rows).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def run_pickled(name: str, directory: Path) -> None:
    """What rank 0 alone would keep of the experts of all is refused, in whatever it stands."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(own_rows(0)).sum().backward()
    optimizer.step()
    parallel = nn.parallel.DistributedDataParallel(model)
    for saved in (model.state_dict(), parallel.state_dict(), optimizer.state_dict(), model):
        with pytest.raises(ValueError, match=r"keep one rank's experts alone .*distributed.checkpoint; .*gather_state"):
            torch.save(saved, io.BytesIO())
    dense = {key: value for key, value in model.state_dict().items() if "experts" not in key}
    torch.save(dense, io.BytesIO())
    for same in (copy.deepcopy(model), copy.deepcopy(model.state_dict())):
        state = same.state_dict() if isinstance(same, nn.Module) else same
        assert all(torch.equal(whole(state[key]), whole(value)) for key, value in model.state_dict().items())

    tm.gather_state_dicts(model, optimizer)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if rank == 0:
        torch.save(saved, directory / "whole.pt")
    dist.barrier()
    loaded = torch.load(directory / "whole.pt")
    one = make_model(is_spread=False)
    one.load_state_dict(loaded["model"])
    torch.optim.AdamW(one.parameters()).load_state_dict(loaded["optimizer"])
    again = make_model()
    other = torch.optim.AdamW(again.parameters())
    tm.gather_state_dicts(again, other)
    again.load_state_dict(loaded["model"])
    other.load_state_dict(loaded["optimizer"])
    for own, expected in zip(again.parameters(), one.parameters(), strict=True):
        assert torch.equal(whole(own), expected)
    for number, state in loaded["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(other.state_dict()["state"][number][key], value)
    for wrong in (nn.Linear(2, 2), make_model(is_spread=False)):
        with pytest.raises(ValueError, match="has no experts that are spread over ranks: parallelize"):
            tm.gather_state_dicts(wrong)
    with pytest.raises(
        TypeError, match=r"give optimizers of torch\.optim themselves, not wrappers around them, got Linear"
    ):
        tm.gather_state_dicts(again, nn.Linear(2, 2))


def prepared(is_spread: bool = True, is_gathered: bool = True) -> tuple[Any, Any, Any]:
    """Return an accelerator, a model and an optimizer as a program of Accelerate has them."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = make_model(is_spread)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    if is_gathered:
        tm.gather_state_dicts(model, optimizer)
    return accelerator, *accelerator.prepare(model, optimizer)


def train_accelerated(accelerator: Any, model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        accelerator.backward(model(own_rows(step)).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()


def run_accelerate(name: str, directory: Path) -> None:
    """Training goes on after save_state and load_state as if it had not ended, and equals one device."""
    accelerator, model, optimizer = prepared()
    train_accelerated(accelerator, model, optimizer, range(2))
    accelerator.save_state(str(directory / "accelerate"))
    train_accelerated(accelerator, model, optimizer, range(2, STEPS))
    expected = weights(accelerator.unwrap_model(model))
    assert_close(expected, on_one_device(*range(STEPS)))

    accelerator, model, optimizer = prepared()
    accelerator.load_state(str(directory / "accelerate"))
    train_accelerated(accelerator, model, optimizer, range(2, STEPS))
    actual = weights(accelerator.unwrap_model(model))
    assert all(torch.equal(actual[key], expected[key]) for key in expected)

    accelerator, model, optimizer = prepared(is_gathered=False)
    train_accelerated(accelerator, model, optimizer, range(1))
    (directory / "refused").mkdir(exist_ok=True)
    if rank == 0:
        with pytest.raises(ValueError, match="gather_state_dicts"):
            accelerator.save_state(str(directory / "refused"), safe_serialization=False)
        with pytest.raises(RuntimeError, match="data pointer"):  # of safetensors, which can't read a DTensor
            accelerator.save_state(str(directory / "refused"))


def run_accelerate_alone(name: str, directory: Path) -> None:
    """What two processes have saved goes on in one, whose model knows nothing of ranks."""
    accelerator, model, optimizer = prepared(is_spread=False, is_gathered=False)
    accelerator.load_state(str(directory / "accelerate"))
    train_accelerated(accelerator, model, optimizer, range(2, STEPS))
    assert_close(weights(accelerator.unwrap_model(model)), on_one_device(*range(STEPS)))


@contextmanager
def fully_sharding(wrapped: str, **settings: Any) -> Iterator[Any]:
    """Yield an accelerator with the FSDP plug-in, which Accelerate takes on accelerators alone: it is told to here."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    before = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    given = {"auto_wrap_policy": "transformer_based_wrap", "ignored_modules": r".*\.experts", **settings}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, transformer_cls_names_to_wrap=[wrapped], **given)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    yield accelerator
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(before)


def prepared_for(accelerator: Any, model: nn.Module) -> tuple[Any, Any, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    return accelerator, *accelerator.prepare(model, optimizer)


def run_accelerate_fsdp(kind: str, directory: Path) -> None:
    """As run_accelerate, fully sharded, in shards that any number of processes loads, or one whole file."""
    saved = str(directory / kind)
    with fully_sharding("MoELayer", state_dict_type=kind) as accelerator:
        accelerator, model, optimizer = prepared_for(accelerator, make_model())
        if size > 1:
            train_accelerated(accelerator, model, optimizer, range(2))
            accelerator.save_state(saved)
            train_accelerated(accelerator, model, optimizer, range(2, STEPS))
            expected = weights(model)
            assert_close(expected, on_one_device(*range(STEPS)))
            dense = [p for name, p in model.named_parameters() if "experts" not in name]
            assert all(p.to_local().numel() < p.numel() for p in dense)
        accelerator.load_state(saved)
        train_accelerated(accelerator, model, optimizer, range(2, STEPS))
        assert_close(weights(model), on_one_device(*range(STEPS)))
        assert size == 1 or all(torch.equal(own, expected[name]) for name, own in weights(model).items())


def run_accelerate_fsdp_model(name: str, directory: Path) -> None:
    """A model of transformers: losses, norms of gradients and weights, recomputed too, are those of plain torch."""
    for recomputes in (False, True):
        plain = make_transformers_model(name)
        with fully_sharding("MixtralDecoderLayer", activation_checkpointing=recomputes) as accelerator:
            model = make_transformers_model(name)
            tmt.parallelize(model, dist.group.WORLD, OVERLAP)
            accelerator, model, optimizer = prepared_for(accelerator, model)
            other = torch.optim.AdamW(plain.parameters(), lr=1e-2, eps=1e-3)
            for step in range(2):
                ids = torch.randint(2, 64, (4, 9), generator=torch.Generator().manual_seed(step))
                own = ids.tensor_split(size)[rank]
                loss = model(input_ids=own, labels=own).loss
                accelerator.backward(loss)
                norm = whole(accelerator.clip_grad_norm_(model.parameters(), 0.1))
                expected = plain(input_ids=ids, labels=ids).loss
                expected.backward()
                mean = loss.detach() / size
                dist.all_reduce(mean)
                found = {"loss": mean, "norm": norm}
                plain_norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
                assert_close(found, {"loss": expected.detach(), "norm": plain_norm})
                for one in (optimizer, other):
                    one.step()
                    one.zero_grad()
            found = {name.replace("_checkpoint_wrapped_module.", ""): own for name, own in weights(model).items()}
            assert_close(found, {name: p.detach() for name, p in plain.named_parameters()})


def run_accelerate_fsdp_refused(name: str, directory: Path) -> None:
    """Every rank raises before anything is sent."""
    refusals = {
        "cpu_ram_efficient_loading": (True, r"sends the first rank's weights to all ranks, .*cpu_ram_efficient_loadin"),
        "ignored_modules": (None, r"Accelerate's plug-in: ignored_modules=r'\.\*\\\.experts'"),
    }
    for setting, (value, says) in refusals.items():
        with fully_sharding("MoELayer", **{setting: value}) as accelerator:
            with pytest.raises(ValueError, match=says):
                prepared_for(accelerator, make_model())
            dist.barrier()


CASES = {
    "pickled": run_pickled,
    "accelerate": run_accelerate,
    "accelerate_alone": run_accelerate_alone,
    "accelerate_fsdp": run_accelerate_fsdp,
    "accelerate_fsdp_model": run_accelerate_fsdp_model,
    "accelerate_fsdp_refused": run_accelerate_fsdp_refused,
}

if __name__ == "__main__":
    main(CASES)
