"""What every rank runs of the export of weights: `torchrun weight_sync_worker.py DIRECTORY CASE...`.

Each case compares with what save_pretrained writes of the model on one process.
"""

from pathlib import Path
from typing import Any

import pytest
import test_families
import torch
import torch.distributed as dist
from expert_parallel_worker import OVERLAP, main, rank, size, whole
from held_storages import HeldStorages
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tritonmoe as tm
from tritonmoe.integrations import transformers as tmt

test_families.SMALL |= {key: 8 for key in test_families.SMALL if key.endswith("experts") and "shared" not in key}
BUCKET = 14_000
"""Bytes: one or two experts of a projection, twice."""


def make_model(family: str) -> Any:
    """Make a model, the same on every rank; in bf16 where the family is called so."""
    model = test_families.make_model(family.removesuffix("_bf16"))
    return model.bfloat16() if family.endswith("_bf16") else model


def saved(model: Any, directory: Path) -> dict[str, Tensor]:
    """Return what save_pretrained of a model that is whole here writes."""
    if rank == 0:
        model.save_pretrained(directory / "saved")
    dist.barrier()
    files = (directory / "saved").glob("*.safetensors")
    found = {name: value for path in files for name, value in load_file(path).items()}
    dist.barrier()
    return found


def check_export(model: nn.Module, expected: dict[str, Tensor], **options: bool) -> None:
    shapes = dict(tm.export_weights(model, only_shapes=True, **options))
    found = [(name, tensor.clone()) for name, tensor in tm.export_weights(model, bucket_bytes=BUCKET, **options)]
    assert [name for name, _ in found] == list(shapes)
    assert len(found) == len(shapes) == len(expected)
    for name, tensor in found:
        assert (tensor.dtype, shapes[name].dtype) == (expected[name].dtype,) * 2
        assert shapes[name].shape == expected[name].shape
        assert shapes[name].is_meta
        assert as_bytes(tensor).equal(as_bytes(expected[name])), name


def as_bytes(tensor: Tensor) -> Tensor:
    """Return what torch.equal compares, which it doesn't of fp8."""
    return tensor.contiguous().view(torch.uint8) if tensor.itemsize == 1 else tensor


def run_exported(family: str, directory: Path) -> None:
    model = make_model(family)
    expected = saved(model, directory)
    tmt.parallelize(model, dist.group.WORLD, OVERLAP)
    check_export(model, expected)
    check_export(nn.parallel.DistributedDataParallel(model), expected)
    model.save_pretrained(directory / "spread")
    loaded = make_model(family)
    with torch.no_grad():
        for tensor in [*loaded.parameters(), *loaded.buffers()]:
            tensor.zero_()
    tmt.parallelize(loaded, dist.group.WORLD, OVERLAP)
    tm.load_weights(loaded, reversed(expected.items()))
    for key, value in loaded.state_dict().items():
        assert torch.equal(whole(value), whole(model.state_dict()[key])), key
    with torch.no_grad():  # a trainer's bf16 into fp32, as cast
        tm.load_weights(loaded, ((name, tensor.bfloat16()) for name, tensor in tm.export_weights(model)))
    check_export(loaded, {name: value.bfloat16().to(value.dtype) for name, value in expected.items()})


def scatter(model: nn.Module) -> None:
    """Move the experts of every layer, so that no rank's are neighbours in the model's order."""
    rebalancer = tm.rebalance(model, every=1)
    for experts, tensors in zip(rebalancer._layers, rebalancer._check(), strict=True):
        order = [expert for start in range(3) for expert in range(start, experts.shards.num_experts, 3)][::-1]
        num_own = experts.shards.num_experts // size
        held = tuple(tuple(order[at : at + num_own]) for at in range(0, len(order), num_own))
        rebalancer._move(experts, tensors, tm.ExpertPlacement(held))


def run_moved(family: str, directory: Path) -> None:
    """What tm.rebalance has moved is exported under its own name, and loaded to where it is."""
    is_adapted = family.endswith("_adapted")
    family = family.removesuffix("_adapted")
    model = adapted(family) if is_adapted else make_model(family)
    expected = saved(adapted(family).merge_and_unload() if is_adapted else make_model(family), directory)
    tmt.parallelize(model, dist.group.WORLD, OVERLAP)
    scatter(model)
    check_export(model, expected)
    if not is_adapted:
        changed = {name: tensor + 1 for name, tensor in expected.items()}
        tm.load_weights(model, changed.items())
        check_export(model, changed)


def adapted(family: str, **settings: Any) -> Any:
    from test_peft_adapters import adapt

    return adapt(make_model(family), **settings)


def run_adapted(family: str, directory: Path) -> None:
    settings: dict[str, Any] = {"target_modules": ["q_proj", "o_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    reference = adapted(family, **settings)
    base = saved(make_model(family), directory)
    merged = saved(reference.merge_and_unload(), directory)
    assert any(not torch.equal(merged[name], base[name]) for name in base if "expert" in name)
    model = adapted(family, **settings)
    check_export(model, merged)  # one process for itself
    tmt.parallelize(model, dist.group.WORLD, OVERLAP)
    before = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    check_export(model, merged)
    with model.disable_adapter():
        check_export(model, base)
        tm.load_weights(model, merged.items())
        check_export(model, merged)
        tm.load_weights(model, base.items())
    assert all(torch.equal(whole(p.detach()), before[name]) for name, p in model.named_parameters())
    check_export(model, merged)
    for merge in (lambda: None, model.merge_adapter):
        merge()
        with pytest.raises(ValueError, match="has an adapter, active or merged, in addition"):
            tm.load_weights(model, merged.items())
    check_export(model, merged)
    with model.disable_adapter(), pytest.raises(ValueError, match=r"none are active: unmerge_adapter\(\)"):
        tm.export_weights(model)


def run_fully_sharded(family: str, directory: Path) -> None:
    """Experts over one axis and their shards over the other, everything else over all ranks; after a step."""
    model = make_model(family)
    expected = saved(model, directory)
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "expert"))
    everybody = init_device_mesh("cpu", (size,))
    tmt.parallelize(model, mesh, OVERLAP)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            fully_shard(layer.mlp.experts, mesh=mesh["data"])
        fully_shard(layer, mesh=everybody)
    fully_shard(model, mesh=everybody)
    check_export(model, expected)
    ids = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids)  # leaves the root gathered
    check_export(model, expected)
    with pytest.raises(ValueError, match=r"is sharded as .*load before fully_shard\(\)"):
        tm.load_weights(model, expected.items())
    beside = make_model(family)
    tmt.parallelize(beside, dist.group.WORLD, OVERLAP)
    fully_shard(beside, mesh=everybody, ignored_params=set(tm.expert_parameters(beside)))
    check_export(beside, expected)
    tm.load_weights(beside, expected.items())
    plain = make_model(family)
    fully_shard(plain, mesh=everybody)
    check_export(plain, expected)


def run_sharded_adapters(family: str, directory: Path) -> None:
    """Nothing spread by parallelize(): FSDP2 alone shards the experts and their factors."""
    merged = saved(adapted(family).merge_and_unload(), directory)
    model = adapted(family)
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    check_export(model, merged)


def run_ep_implementation(family: str, directory: Path) -> None:
    """Spread by transformers when it loads the model; with two groups of ranks on four processes."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    expected = saved(make_model(family), directory)
    tmt.register(OVERLAP)
    model = AutoModelForCausalLM.from_pretrained(
        directory / "saved",
        experts_implementation="tritonmoe",
        distributed_config=DistributedConfig(fsdp_size=size, ep_size=2, ep_implementation="tritonmoe"),
    )
    check_export(model, expected)


def run_bounded(family: str, directory: Path) -> None:
    """Beside the model there is one bucket and, where the checkpoint has no single experts, one projection."""
    for is_adapted in (False, True):
        model = adapted(family) if is_adapted else make_model(family)
        tmt.parallelize(model, dist.group.WORLD, OVERLAP)
        experts = [p for p in tm.expert_parameters(model) if p.dim() == 3 and p.shape[1] > 3 and p.shape[2] > 3]
        projection = max(p.numel() * p.element_size() for p in experts)
        is_fused = family == "gpt_oss"
        if not is_fused:
            assert projection > 1.5 * BUCKET
        iterator = tm.export_weights(model, bucket_bytes=BUCKET)
        with HeldStorages() as held:
            for _, tensor in iterator:
                del tensor
        assert (size > 1 or is_adapted) <= held.peak([]) <= BUCKET + is_fused * projection, (
            held.peak([]),
            projection,
            is_adapted,
        )


def packed_models(family: str, directory: Path) -> tuple[Any, Any]:
    """Return a model whose experts are packed, and the same decoded when it was loaded."""
    from packed_checkpoints import gpt_oss_mxfp4, load_decoded, qwen3_fp8
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    path, own = directory / family, dict(AUTO_QUANTIZER_MAPPING)
    if rank == 0:
        path.mkdir(exist_ok=True)
        {"gpt_oss": gpt_oss_mxfp4, "qwen3": qwen3_fp8}[family](path)
    dist.barrier()
    found = []
    for is_packed in (True, False):
        tmt.register(packed=is_packed)
        load = AutoModelForCausalLM.from_pretrained if is_packed else load_decoded
        found.append(load(path, dtype=torch.bfloat16))
        AUTO_QUANTIZER_MAPPING.update(own)
    dist.barrier()
    return found[0], found[1]


def run_packed(family: str, directory: Path) -> None:
    """Packed experts come as they are, or decoded."""
    packed, plain = packed_models(family, directory)
    as_it_is, decoded = saved(packed, directory), saved(plain, directory)
    tmt.parallelize(packed, dist.group.WORLD, OVERLAP)
    check_export(packed, as_it_is)
    check_export(packed, decoded, dequantize=True)
    if size > 1:
        with pytest.raises(tm.CountMismatch, match="different weights"):
            tm.export_weights(packed, dequantize=rank == 0)
    projection = sum(p.nbytes for n, p in packed.model.layers[0].mlp.experts.named_parameters() if "gate_up_proj" in n)
    iterator = tm.export_weights(packed, bucket_bytes=BUCKET)
    with HeldStorages() as held:
        for _, tensor in iterator:
            del tensor
    assert held.peak([]) <= BUCKET + projection
    if size > 1:
        scatter(packed)
        check_export(packed, as_it_is)
        check_export(packed, decoded, dequantize=True)


def run_packed_adapted(family: str, directory: Path) -> None:
    """Adapters are merged into decoded experts, and never into bytes."""
    from test_peft_adapters import adapt

    packed, plain = packed_models(family, directory)
    settings = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}
    base, base_decoded = saved(packed, directory), saved(plain, directory)
    merged = saved(adapt(plain, **settings).merge_and_unload(), directory)
    assert any(not torch.equal(merged[name], base_decoded[name]) for name in merged if "expert" in name)
    model = adapt(packed, **settings)
    check_export(model, merged, dequantize=True)
    tmt.parallelize(model, dist.group.WORLD, OVERLAP)
    check_export(model, merged, dequantize=True)
    with pytest.raises(ValueError, match=r"is packed, and an active adapter can't be merged .*dequantize=True"):
        tm.export_weights(model)
    with model.disable_adapter():
        check_export(model, base)
        check_export(model, base_decoded, dequantize=True)
    if size > 1:
        scatter(model)
        check_export(model, merged, dequantize=True)


def run_packed_fully_sharded(family: str, directory: Path) -> None:
    packed, plain = packed_models(family, directory)
    as_it_is, decoded = saved(packed, directory), saved(plain, directory)
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "expert"))
    tmt.parallelize(packed, mesh, OVERLAP)
    for layer in packed.model.layers:
        fully_shard(layer.mlp.experts, mesh=mesh["data"])
    fully_shard(packed, mesh=init_device_mesh("cpu", (size,)))
    check_export(packed, as_it_is)
    check_export(packed, decoded, dequantize=True)


def run_refused(name: str, directory: Path) -> None:
    """What differs on a rank ends on every rank, before anything is gathered, and the next export is whole."""
    model = make_model("mixtral")
    expected = saved(model, directory)
    tmt.parallelize(model, dist.group.WORLD, OVERLAP)
    with pytest.raises(tm.CountMismatch, match=f"different weights: .*bucket_bytes={100 + rank}"):
        tm.export_weights(model, bucket_bytes=100 + rank)
    check_export(model, expected)
    says = "must be a positive number" if rank else "export_weights gathers weights .* or raised in it"
    with pytest.raises(ValueError if rank else tm.TransportError, match=says):
        tm.export_weights(model, bucket_bytes=0 if rank else 100)
    check_export(model, expected)
    ids = torch.randint(2, 64, (1, 5), generator=torch.Generator().manual_seed(1))
    says = None if rank else "export_weights gathers weights that are spread over ranks, so every rank must call it"
    with pytest.raises((tm.TransportError, tm.CountMismatch), match=says):
        tm.export_weights(model) if rank == 0 else model(input_ids=ids)


CASES = {
    "exported": run_exported,
    "moved": run_moved,
    "adapted": run_adapted,
    "fully_sharded": run_fully_sharded,
    "sharded_adapters": run_sharded_adapters,
    "ep_implementation": run_ep_implementation,
    "bounded": run_bounded,
    "packed": run_packed,
    "packed_adapted": run_packed_adapted,
    "packed_fully_sharded": run_packed_fully_sharded,
    "refused": run_refused,
}

if __name__ == "__main__":
    main(CASES)
