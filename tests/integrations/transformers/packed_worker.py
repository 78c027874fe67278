"""What every rank of test_packed_models.py runs: `torchrun packed_worker.py DIRECTORY CASE...`."""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

from packed_checkpoints import load_decoded
from same_bits import assert_same_bits

import tritonmoe as tm
from tritonmoe.integrations import transformers as tmt

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank = dist.get_rank()
IDS = torch.arange(24).view(2, 12) % 64 + rank


def models() -> tuple[Any, Any]:
    """Return a packed model and a decoded one, both spread."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    before = dict(AUTO_QUANTIZER_MAPPING)
    found = []
    for packed in (True, False):
        tmt.register(packed=packed)
        load = transformers.AutoModelForCausalLM.from_pretrained if packed else load_decoded
        model = load(folder / "checkpoint", dtype=torch.bfloat16)
        AUTO_QUANTIZER_MAPPING.update(before)
        tmt.parallelize(model, dist.group.WORLD, tm.OverlapConfig(2))
        found.append(model)
    return found[0], found[1]


def logits() -> None:
    packed, plain = models()
    assert torch.equal(packed(IDS).logits, plain(IDS).logits)
    assert torch.equal(copy.deepcopy(packed)(IDS).logits, plain(IDS).logits)


def adapters() -> None:
    import peft

    files = []
    for number, model in enumerate(models()):
        torch.manual_seed(1)
        parameters = ["experts.gate_up_proj", "experts.down_proj"]
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=parameters, init_lora_weights=False)
        own = peft.get_peft_model(model, config)
        optimizer = torch.optim.SGD([p for p in own.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            own(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        own.save_pretrained(folder / f"adapters{number}")
        dist.barrier()
        files.append(load_file(folder / f"adapters{number}" / "adapter_model.safetensors"))
    assert_same_bits(files[0], files[1])


def saved() -> None:
    packed, _ = models()
    packed.save_pretrained(folder / "saved")
    dist.barrier()
    state = load_file(folder / "saved" / "model.safetensors")
    before = load_file(folder / "checkpoint" / "model.safetensors")
    of_experts = {name: value for name, value in before.items() if ".experts." in name}
    assert_same_bits({name: state[name] for name in of_experts}, of_experts)


for case in sys.argv[2:]:
    {"logits": logits, "adapters": adapters, "saved": saved}[case]()
    if rank == 0:
        print(f"passed {case}", flush=True)
dist.destroy_process_group()
