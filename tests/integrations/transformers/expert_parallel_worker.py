"""What every rank of the expert-parallel tests runs: `torchrun expert_parallel_worker.py DIRECTORY CASE...`.

Each case compares with one process on the whole batch, computed here by transformers' own "eager"; an assertion ends
the rank, and with it the test.
"""

import copy
import importlib.util
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from large_weights import draw_large_weights
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, AutoModelForCausalLM

import tritonmoe as tm
from tritonmoe.integrations import transformers as tmt
from tritonmoe.routing import RoutingRecording, save_topk
from tritonmoe.tools.doctor.recorded_run import judge_recording
from tritonmoe.tools.recording import record
from tritonmoe.tools.recording.recording_reader import read_recording

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=8),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SIZES, num_experts=8, moe_intermediate_size=12),
    "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, num_local_experts=8),
}
OVERLAP = tm.OverlapConfig(num_chunks=3)
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), experts_implementation="eager")
    draw_large_weights(model)
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    errors = {
        name: ((actual[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)).item()
        for name in expected
    }
    assert max(errors.values()) < 2e-5, {name: error for name, error in errors.items() if error >= 2e-5}


def batch(num_rows: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(2, 64, (num_rows, 9))


def reference(name: str, ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Logits and every gradient of one process on the whole batch, and its greedy continuation."""
    model = make_model(name)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    tokens = model.eval().generate(ids[:, :4], max_new_tokens=6, do_sample=False)
    return {"logits": output.logits.detach(), **gradients(model)}, tokens


def same_everywhere(logits: Tensor) -> Tensor:
    """Every rank's logits, one below the other."""
    parts = [torch.empty_like(logits) for _ in range(size)]
    dist.all_gather(parts, logits.contiguous())
    return torch.cat(parts)


def average_dense_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor) and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= size


def run_parallelized(name: str, directory: Path) -> None:
    ids = batch()
    expected, tokens = reference(name, ids)
    own = slice(rank * 2, rank * 2 + 2)
    model = make_model(name)
    names = list(model.state_dict())
    assert tmt.parallelize(model, dist.group.WORLD, OVERLAP) == 2
    assert list(model.state_dict()) == names
    recorded = directory / f"{name}-recorded"
    with record(recorded):
        output = model(input_ids=ids[own], labels=ids[own])
        output.loss.backward()
    average_dense_gradients(model)
    dist.barrier()  # until every rank's file is written
    recording = read_recording(recorded)
    assert [(call.layer, call.has_backward) for call in recording.calls] == [(0, True), (1, True)]
    assert judge_recording(recording).found.measured_s > 0
    assert_close({"logits": same_everywhere(output.logits.detach()), **gradients(model)}, expected)
    generated = model.eval().generate(ids[own, :4], max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, tokens[own])
    with tmt.collect_statistics(model) as statistics:
        model(input_ids=ids[own])
    assert {(len(load), sum(load)) for load in statistics.loads.values()} == {(8, ids[own].numel() * 3)}
    # a rank whose text has ended helps the others to the end of theirs
    num_new = 6 if rank == 0 else 2
    for part, settings in ((model, {}), (copy.deepcopy(model), {"synced_gpus": False})):  # as TRL and Seq2SeqTrainer do
        shorter = part.generate(ids[own, :4], max_new_tokens=num_new, do_sample=False, **settings)
        assert torch.equal(shorter, tokens[own, : 4 + num_new])
    # a rank without a single token takes part all the same
    experts = model.model.layers[0].mlp.experts
    rows = 3 if rank == 0 else 0
    x = torch.randn(rows, 32, requires_grad=True)
    y = experts(x, torch.arange(rows * 2).view(rows, 2) % 8, torch.ones(rows, 2))
    y.sum().backward()
    assert y.shape == x.grad.shape == (rows, 32)

    model.save_pretrained(directory / name)
    loaded = AutoModelForCausalLM.from_pretrained(directory / name, experts_implementation="eager")
    fresh = make_model(name).state_dict()
    assert all(torch.equal(loaded.state_dict()[key], fresh[key]) for key in fresh)


def run_compiled(name: str, directory: Path) -> None:
    ids = batch()
    expected, _ = reference(name, ids)
    own = slice(rank * 2, rank * 2 + 2)
    model = make_model(name)
    tmt.parallelize(model, dist.group.WORLD, OVERLAP)
    output = torch.compile(model, backend="aot_eager")(input_ids=ids[own], labels=ids[own])
    output.loss.backward()
    average_dense_gradients(model)
    assert_close({"logits": same_everywhere(output.logits.detach()), **gradients(model)}, expected)


def run_wrapped(name: str, directory: Path) -> None:
    """Inside another module the model itself, and the one inside it, save with their experts gathered."""
    wrapped = nn.ModuleDict({"first": make_model(name)})
    tmt.parallelize(wrapped, dist.group.WORLD)
    model, fresh = wrapped["first"], make_model(name)
    for part, plain, kind in ((model, fresh, AutoModelForCausalLM), (model.model, fresh.model, AutoModel)):
        path = directory / f"wrapped-{type(part).__name__}"
        part.save_pretrained(path)
        loaded = kind.from_pretrained(path).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in plain.state_dict().items())


CHECKPOINTS = ({"use_reentrant": False}, {"use_reentrant": True}, {"use_reentrant": False, "context_fn": save_topk})


def enable_checkpoints(model: nn.Module, options: dict) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def run_checkpointed(name: str, directory: Path) -> None:
    """With "auto", which changes its plan from call to call at first: a recompute must take that of its forward."""
    own = slice(rank * 2, rank * 2 + 2)
    results = []
    for options in (None, *CHECKPOINTS):
        model = make_model(name).train()
        tmt.parallelize(model, dist.group.WORLD, OVERLAP if options is None else tm.OverlapConfig())
        if options is not None:
            enable_checkpoints(model, options)
        for _ in range(3):
            ids = batch()
            model(input_ids=ids[own], labels=ids[own]).loss.backward()
        results.append(gradients(model))
    for actual in results[1:]:
        assert_close(actual, results[0])


def run_ep_implementation(name: str, directory: Path, layout: str) -> None:
    from transformers.distributed import DistributedConfig

    ids = batch()
    expected, tokens = reference(name, ids)
    if rank == 0:
        make_model(name).save_pretrained(directory / f"whole-{name}")
    dist.barrier()
    tmt.register(OVERLAP)
    sizes = {"tp_size": size} if layout == "tp" else {"fsdp_size": size}
    model = AutoModelForCausalLM.from_pretrained(
        directory / f"whole-{name}",
        experts_implementation="tritonmoe",
        distributed_config=DistributedConfig(**sizes, ep_size=size, ep_implementation="tritonmoe"),
    )
    implementation = type(next(iter(ep_implementations(model))))
    assert implementation.__name__ == "OverlappedEP", implementation
    own = slice(0, 4) if layout == "tp" else slice(rank * 2, rank * 2 + 2)
    output = model(input_ids=ids[own], labels=ids[own])
    output.loss.backward()
    logits = whole(output.logits).detach()
    actual = {"logits": logits if layout == "tp" else same_everywhere(logits), **gradients(model)}
    assert_close(actual, expected)
    for options in CHECKPOINTS:
        enable_checkpoints(model.train(), options)
        model.zero_grad()
        model(input_ids=ids[own], labels=ids[own]).loss.backward()
        assert_close(gradients(model), {name: expected[name] for name in expected if name != "logits"})
    halved = tmt.two_batches(model)
    model.zero_grad()
    output = model(input_ids=ids[own], labels=ids[own])
    output.loss.backward()
    logits = whole(output.logits).detach()
    assert_close({"logits": logits if layout == "tp" else same_everywhere(logits), **gradients(model)}, expected)
    assert halved.choice.startswith("two halves"), halved.choice
    halved.remove()
    generated = model.eval().generate(ids[own, :4], max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, tokens[own]), (generated, tokens)
    with tmt.collect_statistics(model) as statistics:
        model(input_ids=ids[own])
    assert {(len(load), sum(load)) for load in statistics.loads.values()} == {(8, ids[own].numel() * 3)}
    index = torch.arange(ids.numel()).view(ids.shape)[own]
    recording = random_recording(ids.numel()).rearranged(index)
    with tmt.replay_routing(model, recording), tmt.record_routing(model) as replayed:
        replayed_logits = whole(model(input_ids=ids[own]).logits).detach()
    assert set(recording.agreement(replayed).values()) == {1.0}
    plain = make_model(name).eval()
    with tmt.replay_routing(plain, recording):
        assert_close({"logits": replayed_logits}, {"logits": plain(input_ids=ids[own]).logits.detach()})
    # one sequence: in decode a TP-shared token is one rank's, and the others have none
    alone = model.generate(ids[own][:1, :4], max_new_tokens=6, do_sample=False)
    assert torch.equal(alone, tokens[own][:1])


def run_refused_ep_implementation(name: str, directory: Path) -> None:
    """transformers refuses it before a weight is read."""
    import pytest
    from transformers.distributed import DistributedConfig

    odd = directory / "seven-experts"
    if rank == 0:
        config = transformers.MixtralConfig(**SIZES, num_local_experts=7)
        AutoModelForCausalLM.from_config(config).save_pretrained(odd)
    dist.barrier()
    tmt.register(OVERLAP)
    for sizes in ({"tp_size": size}, {"fsdp_size": size}):
        layout = DistributedConfig(**sizes, ep_size=size, ep_implementation="tritonmoe")
        with pytest.raises(ValueError, match=f"7 experts across {size} expert-parallel ranks"):
            AutoModelForCausalLM.from_pretrained(odd, experts_implementation="tritonmoe", distributed_config=layout)


def random_recording(num_tokens: int) -> RoutingRecording:
    """Ids that no router would choose, of all ranks' tokens."""
    recording = RoutingRecording()
    for number in range(2):
        scores = torch.rand(num_tokens, 8, generator=torch.Generator().manual_seed(number))
        recording.add(f"model.layers.{number}.mlp.experts", scores.topk(3, dim=1).indices, 8)
    return recording


def run_replayed(name: str, directory: Path) -> None:
    """Every rank replays its own tokens; where one rank's recording doesn't fit, every rank raises, and goes on."""
    import pytest

    ids = batch()
    recording = random_recording(ids.numel())
    index = torch.arange(ids.numel()).view(ids.shape)
    model = make_model(name)
    with tmt.replay_routing(model, recording):
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
    expected = {"logits": output.logits.detach(), **gradients(model)}
    own = slice(rank * 2, rank * 2 + 2)
    mine = recording.rearranged(index[own])

    for options in (None, *CHECKPOINTS):
        model = spread_model(name, options)
        wrapped = DistributedDataParallel(model)
        with tmt.replay_routing(wrapped, mine), tmt.record_routing(wrapped) as replayed:
            output = wrapped(input_ids=ids[own], labels=ids[own])
            output.loss.backward()
        assert set(mine.agreement(replayed).values()) == {1.0}
        assert_close({"logits": same_everywhere(output.logits.detach()), **gradients(model)}, expected)
    sharded = make_model(name).train()
    enable_checkpoints(sharded, CHECKPOINTS[0])
    for block in sharded.model.layers:
        fully_shard(block)
    fully_shard(sharded)
    with tmt.replay_routing(sharded, mine):
        sharded(input_ids=ids[own], labels=ids[own]).loss.backward()
    assert_close(gradients(sharded), {key: expected[key] for key in expected if key != "logits"})
    short = mine.rearranged(torch.arange(17)) if rank == 1 else mine
    with (
        pytest.raises(ValueError, match="recorded with 17 tokens")
        if rank == 1
        else pytest.raises(tm.TransportError, match="refused"),
        tmt.replay_routing(model, short),
    ):
        model(input_ids=ids[own])
    with tmt.replay_routing(model, mine):
        again = model(input_ids=ids[own]).logits
    assert_close({"logits": same_everywhere(again.detach())}, {"logits": expected["logits"]})


def spread_model(name: str, options: dict | None) -> nn.Module:
    model = make_model(name).train()
    tmt.parallelize(model, dist.group.WORLD, OVERLAP)
    if options is not None:
        enable_checkpoints(model, options)
        model.enable_input_require_grads()
    return model


def ep_implementations(model: nn.Module):
    for module in model.modules():
        forward = module.__dict__.get("forward")
        for cell in getattr(forward, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "ep_mesh"):
                yield cell.cell_contents


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    ids = batch()
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        average_dense_gradients(model)  # else a parameter's last bits are each rank's own
        optimizer.step()


def checkpoint_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make_model("mixtral")
    tmt.parallelize(model, dist.group.WORLD, OVERLAP)
    experts = [p for p in model.parameters() if isinstance(p, DTensor)]
    others = [p for p in model.parameters() if not isinstance(p, DTensor)]
    return model, torch.optim.AdamW([{"params": others}, {"params": experts}], lr=1e-2)


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def flatten(tree: dict, prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, Tensor):
            flat[prefix + key] = whole(value)
    return flat


def run_save(name: str, directory: Path) -> None:
    import torch.distributed.checkpoint as dcp

    model, optimizer = checkpoint_model()
    train_steps(model, optimizer, 2)
    saved = state(model, optimizer)
    dcp.save(saved, checkpoint_id=str(directory / "dcp"))
    flat = flatten(saved)
    if rank == 0:
        torch.save(flat, directory / "whole.pt")


def run_load(name: str, directory: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model, optimizer = checkpoint_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    loaded = state(model, optimizer)  # also gives the optimizer its empty moments
    dcp.load(loaded, checkpoint_id=str(directory / "dcp"))
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    actual, expected = flatten(state(model, optimizer)), torch.load(directory / "whole.pt")
    assert actual.keys() == expected.keys()
    moments = [key for key in expected if "exp_avg" in key and "experts" in key]
    assert len(moments) == 8, moments
    for key in expected:
        assert torch.equal(actual[key], expected[key]), key


def run_normed(name: str, directory: Path) -> None:
    """muse_spark, whose experts' outputs go through a norm before they are weighted."""
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

    config = transformers.MixtralConfig(**SIZES, num_local_experts=8)
    own_names = {"num_experts": 8, "moe_hidden_size": 32, "moe_intermediate_size": 12, "post_norm_eps": 1e-6}
    for name, value in own_names.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    x, dout = torch.randn(10, 32), torch.randn(10, 32)
    ids, weights = torch.rand(10, 8).topk(3).indices, torch.rand(10, 3)
    results = []
    for own in (slice(0, 10), slice(0, 3) if rank == 0 else slice(3, 10)):
        torch.manual_seed(0)
        experts = MuseSparkExperts(config)
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.3)
        config._experts_implementation = "eager"
        if results:
            tmt.parallelize(nn.Sequential(experts), dist.group.WORLD, OVERLAP, expert_gradients="sum")
        rows = x[own].requires_grad_()
        out = experts(rows, ids[own], weights[own])
        out.backward(dout[own])
        grads = gradients(experts)
        if results:
            dist.all_reduce(grads["post_expert_norm.weight"])
        results.append(({"out": out.detach(), "x": rows.grad}, grads))
        x = x.detach()
    assert_close(results[1][0], {key: value[own] for key, value in results[0][0].items()})
    assert_close(results[1][1], results[0][1])


def run_refused(name: str, directory: Path) -> None:
    import pytest

    odd = AutoModelForCausalLM.from_config(transformers.MixtralConfig(**SIZES, num_local_experts=7))
    with pytest.raises(ValueError, match=r"num_experts \(7\) must be divisible by the number of ranks \(2\)"):
        tmt.parallelize(odd, dist.group.WORLD)
    assert not any(isinstance(parameter, DTensor) for parameter in odd.parameters())
    with pytest.raises(ValueError, match="it has no experts"):
        tmt.parallelize(AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)), dist.group.WORLD)
    model = make_model("mixtral")
    first, second = (layer.mlp.experts for layer in model.model.layers[:2])
    own, second.down_proj = second.down_proj, first.down_proj
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.down_proj and .* are tied"):
        tmt.parallelize(model, dist.group.WORLD)
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    second.down_proj = own
    hook = first.down_proj.register_hook(torch.neg) if rank == 1 else None
    with pytest.raises(ValueError, match="has hooks" if rank == 1 else r"ranks \[1\] can't spread the experts"):
        tmt.parallelize(model, dist.group.WORLD)
    if hook is not None:
        hook.remove()
    gate = model.model.layers[1].mlp.gate
    gate.weight.data *= 1 + rank
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate.weight of Mixtral\w* has another value on ranks \[1\]"):
        tmt.parallelize(model, dist.group.WORLD)
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert model.config._experts_implementation != "tritonmoe"
    gate.weight.data /= 1 + rank
    first.down_proj.scale_of_rate = 3.0
    tmt.parallelize(model, dist.group.WORLD)
    assert first.down_proj.scale_of_rate == 3.0
    with pytest.raises(ValueError, match="is spread over cpu, ranks"):
        tmt.upcycle(model, 4, 2)
    with pytest.raises(ValueError, match="spread over ranks already"):
        tmt.parallelize(model, dist.group.WORLD)
    refuses_other_implementations(model)
    (directory / "file").touch()
    with pytest.raises((tm.TransportError, NotADirectoryError) if rank == 0 else tm.TransportError):
        model.save_pretrained(directory / "file" / "inside")
    says_what_a_full_disk_holds(model, directory / "full")
    if importlib.util.find_spec("peft") is not None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights=False)
        adapted = get_peft_model(model, config)
        adapted.add_adapter("other", config)
        adapted.base_model.set_adapter(["default", "other"])
        with pytest.raises(ValueError, match=r"whose experts are spread over ranks, since 2 adapters are active"):
            adapted(input_ids=batch())
        adapted.unload()(input_ids=batch())
        wrapped = get_peft_model(make_model("mixtral"), LoraConfig(r=2, target_modules=["q_proj"]))
        tmt.parallelize(wrapped, dist.group.WORLD)
        wrapped.set_experts_implementation("tritonmoe")
        longer = wrapped.generate(input_ids=batch()[:, :4], max_new_tokens=2 + 2 * rank, do_sample=False)
        assert longer.shape == (4, 6 + 2 * rank)
        with pytest.raises(ValueError, match="the experts of MixtralForCausalLM are spread"):
            wrapped.set_experts_implementation("eager")


def refuses_other_implementations(model: nn.Module) -> None:
    import pytest

    only = r'experts_implementation="tritonmoe" runs such experts, got '
    for implementation, named in (("eager", "'eager'"), ({"": "grouped_mm"}, "'grouped_mm'"), (None, "None")):
        with pytest.raises(
            ValueError, match=f"the experts of MixtralForCausalLM are spread .*{only}{named}: leave the"
        ):
            model.set_experts_implementation(implementation)
    with pytest.raises(ValueError, match=only):
        model.model.set_experts_implementation("batched_mm")
    model.set_experts_implementation("tritonmoe")
    tmt.patch(model)
    model(input_ids=batch())
    model.config._experts_implementation = "eager"  # nobody hears of it before the forward
    with pytest.raises(ValueError, match=rf"the experts of model\.layers\.0\.mlp\.experts are spread .*{only}'eager'"):
        model(input_ids=batch())
    model.config._experts_implementation = "tritonmoe"


def says_what_a_full_disk_holds(model: nn.Module, directory: Path) -> None:
    import pytest
    from safetensors import SafetensorError

    errors = (SafetensorError("I/O error: No space left on device"), OSError(28, "No space left on device"))
    for error in errors:

        def save(model, directory, error=error, **_):
            directory.mkdir(exist_ok=True)
            (directory / "config.json").touch()
            raise error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model), "save_pretrained", save)
            expected = (tm.TransportError, "the first rank could not save to .*full: its own error says why")
            if rank == 0:
                holds = "No space left on device.*The directory holds config.json, which is not the whole model"
                expected = (OSError, rf"could not write the model's 0\.00 GB to \S*full \(.*{holds}")
            with pytest.raises(expected[0], match=expected[1]):
                model.save_pretrained(directory)


CASES = {
    "parallelize": run_parallelized,
    "checkpointed": run_checkpointed,
    "compiled": run_compiled,
    "replayed": run_replayed,
    "wrapped": run_wrapped,
    "tp": lambda name, directory: run_ep_implementation(name, directory, "tp"),
    "fsdp": lambda name, directory: run_ep_implementation(name, directory, "fsdp"),
    "save": run_save,
    "load": run_load,
    "normed": run_normed,
    "refused": run_refused,
    "refused_ep_implementation": run_refused_ep_implementation,
}


def main(cases: dict[str, Callable[[str, Path], None]]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    # torchrun keeps one store for all restarts, in which gloo would find the addresses of dead ranks.
    store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=60)))
    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    directory = Path(sys.argv[1])
    for case in sys.argv[2:]:
        kind, _, name = case.partition(":")
        cases[kind](name, directory)
        dist.barrier()
        if rank == 0:
            print(f"passed {case}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(CASES)
