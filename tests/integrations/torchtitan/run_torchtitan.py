"""torchtitan's own training program on a CPU: `torchrun run_torchtitan.py LOSSES ARGUMENT...`.

Its debug models have fewer layers here. The file gets the losses of the steps; beside it, LOSSES.times the seconds at
which each step ended, LOSSES.experts the seconds of each step's forwards of routed experts, recomputes included, and
LOSSES.weights the digests of the weights before the first step, by their names in state dicts.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import cpu_device
import torch
import torchtitan.models.deepseek_v3 as titan_deepseek
import torchtitan.models.qwen3 as titan_qwen3
import torchtitan.train
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.models.common.moe import RoutedExperts
from torchtitan.trainer import Trainer


def with_layers(make: Any, number: int) -> Any:
    def made(*arguments: Any, **keywords: Any) -> Any:
        config = make(*arguments, **keywords)
        config.layers = config.layers[:number]
        return config

    return made


def digests(model: torch.nn.Module) -> dict[str, str]:
    """Return a digest of the bits of each whole weight; every rank calls."""
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    whole = {name: of.full_tensor() if isinstance(of, DTensor) else of for name, of in weights.items()}
    return {name: hashlib.sha256(of.contiguous().numpy().tobytes()).hexdigest() for name, of in whole.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    cpu_device.finish()
    for configs, name, number in (
        (titan_qwen3.qwen3_configs, "debugmodel_moe", 2),
        (titan_deepseek.deepseekv3_configs, "debugmodel", 3),  # the first is dense
    ):
        configs[name] = with_layers(configs[name], number)
    losses_path = Path(sys.argv.pop(1))
    losses, ends, experts_s = [], [], [0.0]
    log = MetricsProcessor.log

    def count(module: Any, sign: int) -> None:
        if isinstance(module, RoutedExperts):
            experts_s[-1] += sign * time.perf_counter()

    register_module_forward_pre_hook(lambda module, _: count(module, -1))
    register_module_forward_hook(lambda module, *_: count(module, 1), always_call=True)  # a recompute may stop early

    def kept(self: Any, step: int, global_avg_loss: float, *rest: Any, **named: Any) -> Any:
        losses.append(float(global_avg_loss))
        ends.append(time.perf_counter())
        experts_s.append(0.0)
        return log(self, step, global_avg_loss, *rest, **named)

    train = Trainer.train

    def from_first_weights(self: Any) -> Any:
        (model,) = self.model_parts
        first = json.dumps(digests(model))
        if os.environ.get("RANK", "0") == "0":
            losses_path.with_suffix(".weights").write_text(first)
        return train(self)

    MetricsProcessor.log, Trainer.train = kept, from_first_weights
    torchtitan.train.main()
    if os.environ.get("RANK", "0") == "0":
        losses_path.write_text(json.dumps(losses))
        losses_path.with_suffix(".times").write_text(json.dumps(ends))
        losses_path.with_suffix(".experts").write_text(json.dumps(experts_s[:-1]))
