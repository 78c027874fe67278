"""What every rank of test_transformers_generation.py runs: `torchrun generation_worker.py DIRECTORY CASE...`.

Ranks generate texts of other lengths, each compared with one process that holds the whole model.
"""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from expert_parallel_worker import OVERLAP, SIZES, main, make_model, rank, size
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import tritonmoe as tm
from tritonmoe.integrations import transformers as tmt

NUM_NEW = 9 - 3 * (rank % 3)
"""So that rank 0's text is the longest."""
TOP_K = SIZES["num_experts_per_tok"]


def prompts(num_sequences: int = 2, length: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(10 + rank)
    return torch.randint(2, 64, (num_sequences, length), generator=generator)


def spread(name: str = "mixtral", over: Any = None) -> tuple[Any, Any]:
    """A spread model, and one that is not."""
    model = make_model(name).eval()
    plain = copy.deepcopy(model)
    tmt.parallelize(model, dist.group.WORLD if over is None else over, OVERLAP)
    return model, plain


def check(model: Any, plain: Any, ids: Tensor, num_new: int = NUM_NEW, num_recorded: int | None = None, **settings):
    """Generate with both; recordings and statistics hold the rank's own tokens, as those of the plain model do."""
    settings = {"max_new_tokens": num_new, "do_sample": False, **settings}
    with tmt.record_routing(plain) as expected_routing:
        expected = plain.generate(ids, **{**settings, "synced_gpus": False})
    with tmt.record_routing(model) as recording, tmt.collect_statistics(model) as statistics:
        actual = model.generate(ids, **settings)
    assert torch.equal(actual, expected), (settings, actual, expected)
    assert recording.layers.keys() == expected_routing.layers.keys()
    for layer, recorded in recording.layers.items():
        assert recorded.num_tokens == expected_routing.layers[layer].num_tokens, (settings, layer)
        assert torch.equal(recorded.topk_ids, expected_routing.layers[layer].topk_ids), (settings, layer)
    for layer, load in zip(recording.layers.values(), statistics.loads.values(), strict=True):
        assert sum(load) == sum(layer.num_tokens) * layer.top_k


def upcycled(dense: nn.Module) -> tuple[Any, Any]:
    model: Any = tmt.upcycle(dense.eval(), num_experts=4, top_k=2).eval()
    plain = copy.deepcopy(model)
    tmt.parallelize(model, dist.group.WORLD, OVERLAP)
    return model, plain


def run_lengths(name: str, directory: Path) -> None:
    """A static cache has no room beyond the own text, and learned positions end with it."""
    model, plain = spread(name)
    check(model, plain, prompts())
    check(model, plain, prompts(), synced_gpus=True)
    check(model, plain, prompts(), cache_implementation="static")
    check(copy.deepcopy(model), plain, prompts(), cache_implementation="static", synced_gpus=False)
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64, "n_positions": 16}
    torch.manual_seed(0)
    model, plain = upcycled(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, eos_token_id=None, bos_token_id=None))
    )
    check(model, plain, prompts(length=4 + 8 * rank), num_new=12 - 8 * rank)  # all 16 positions


def run_grpo(name: str, directory: Path) -> None:
    """The recipe of docs/how-to/routing-replay.md, where the answers of every rank end at a length of their own."""
    model, _ = spread(name)
    ids = prompts(1).expand(3, -1)
    with tmt.record_routing(model) as recording:
        answers = model.generate(ids, max_new_tokens=NUM_NEW, do_sample=True)
    index = recording.token_index(3)
    assert index.shape == (3, 4 + NUM_NEW - 1)
    replay = recording.rearranged(index)
    with tmt.replay_routing(model, replay), tmt.record_routing(model) as own:
        model.train()(answers[:, :-1]).logits.float().logsumexp(-1).mean().backward()
    assert set(replay.agreement(own).values()) == {1.0}
    # a replay of what one rank generates takes none of its calls for what others ask of it
    with tmt.replay_routing(model.eval(), recording):
        again = model.generate(ids, max_new_tokens=NUM_NEW, do_sample=False)
    assert again.shape == answers.shape


def run_load(name: str, directory: Path) -> None:
    """What a router counts in training mode, and what random numbers come next, is this rank's own affair."""
    model, _ = spread(name)
    counting = tm.MoELayer(tm.MoEConfig(32, 16, 4, 2, selection_bias=True))
    model.model.layers[0].register_forward_hook(lambda _, __, out: counting(out) * 0 + out)
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    states = []
    for num_new in (NUM_NEW, 6):  # then nobody helps
        torch.manual_seed(rank)
        model.generate(prompts(), max_new_tokens=num_new, do_sample=True)
        states.append(torch.get_rng_state())
        assert counting.router.load.sum() == 2 * (4 + num_new - 1) * 2
        counting.router.load.zero_()
    assert torch.equal(*states) == (NUM_NEW == 6)


def run_ways(name: str, directory: Path) -> None:
    """Every way of transformers to generate, with other numbers of forwards on every rank."""
    model, plain = spread(name)
    check(model, plain, prompts(), num_beams=3)
    check(model, plain, prompts(), num_beams=2, num_return_sequences=2, early_stopping=True)
    check(model, plain, prompts(1, 12), prompt_lookup_num_tokens=3, eos_token_id=63)  # 5.7 wants one
    check(model, plain, prompts(), guidance_scale=1.5)
    check(model, plain, prompts(length=9 if rank else 4), prefill_chunk_size=3)
    check(model, plain, prompts(), use_cache=False)
    for _ in range(2):
        torch.manual_seed(3)
        expected = plain.generate(prompts(), max_new_tokens=NUM_NEW, do_sample=True, num_return_sequences=2)
        torch.manual_seed(3)
        actual = model.generate(prompts(), max_new_tokens=NUM_NEW, do_sample=True, num_return_sequences=2)
        assert torch.equal(actual, expected)
    streamed: list[int] = []

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def put(self, value: Tensor) -> None:
            streamed.extend(value.flatten().tolist())

        def end(self) -> None:
            streamed.append(-1)

    expected = plain.generate(prompts(1), max_new_tokens=NUM_NEW, do_sample=False)
    model.generate(prompts(1), max_new_tokens=NUM_NEW, do_sample=False, streamer=Streamer())
    assert streamed == [*expected[0].tolist(), -1]

    def two_steps(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
        for _ in range(2 if rank else 5):
            input_ids = torch.cat([input_ids, model(input_ids).logits[:, -1:].argmax(-1)], dim=1)
        return input_ids

    ids = prompts()
    assert torch.equal(model.generate(ids, custom_generate=two_steps), plain.generate(ids, custom_generate=two_steps))
    halved = tmt.two_batches(model) if importlib.util.find_spec("greenlet") else None
    check(model, plain, prompts())
    settings: dict[str, Any] = {"max_new_tokens": NUM_NEW, "do_sample": False}
    uncached = model.generate(ids, **settings, use_cache=False)  # in halves, where no rank helps with one sequence
    assert torch.equal(uncached, plain.generate(ids, **settings))
    if halved is not None:
        halved.remove()
    # an assistant of which each rank runs other numbers of drafts, whole and spread
    expected = plain.generate(prompts(1), **settings)
    assistant = make_model("qwen3_moe").eval()
    assert torch.equal(model.generate(prompts(1), **settings, assistant_model=assistant), expected)
    tmt.parallelize(assistant, dist.group.WORLD, OVERLAP)
    assert torch.equal(model.generate(prompts(1), **settings, assistant_model=assistant), expected)
    positional = prompts(1), None, None, None, None, None, assistant
    assert torch.equal(model.generate(*positional, **settings), expected)
    with pytest.raises(AttributeError, match=r"config|dtype|device"):  # of its own: it is no module
        type("Alone", (transformers.GenerationMixin,), {})().generate(ids)


def run_stopped(name: str, directory: Path) -> None:
    """Texts that end by themselves: at other tokens, all at once, by time, and by an end that no other rank sees."""
    model, plain = spread(name)
    ids = prompts()
    for end in (int(plain.generate(ids, max_new_tokens=3, do_sample=False)[0, -1]), 63):
        check(model, plain, ids, num_new=12, eos_token_id=end)
    timed = model.generate(ids, max_new_tokens=12, do_sample=False, **({} if rank else {"max_time": 1e-6}))
    assert timed.shape[1] == (16 if rank else 5)
    assert torch.equal(timed, plain.generate(ids, max_new_tokens=timed.shape[1] - 4, do_sample=False))


def run_encoder_decoder(name: str, directory: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    config = transformers.T5Config(**sizes, eos_token_id=None, decoder_start_token_id=0)
    model, plain = upcycled(transformers.T5ForConditionalGeneration(config))
    check(model, plain, prompts())
    check(model, plain, prompts(), num_beams=2)
    outputs = plain.get_encoder()(prompts())
    expected = plain.generate(prompts(), max_new_tokens=NUM_NEW, do_sample=False)
    given = {} if rank else {"encoder_outputs": outputs}  # this rank helps the others with their encoder
    assert torch.equal(model.generate(prompts(), max_new_tokens=NUM_NEW, do_sample=False, **given), expected)


def run_wrapped(name: str, directory: Path) -> None:
    """PEFT, DistributedDataParallel and FSDP2, which gathers weights before a forward can be announced."""
    if importlib.util.find_spec("peft") is not None:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        plain = get_peft_model(make_model(name), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model = copy.deepcopy(plain)
        tmt.parallelize(model, dist.group.WORLD, OVERLAP)
        check(model.eval(), plain.eval(), prompts())
    model, plain = spread(name)
    check(nn.parallel.DistributedDataParallel(model).module, plain, prompts())
    mesh, experts = init_device_mesh("cpu", (size,)), set(tm.expert_parameters(model))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=experts)
    fully_shard(model, mesh=mesh, ignored_params=experts)
    check(model, plain, prompts())


def run_compiled(name: str, directory: Path) -> None:
    model, plain = spread(name)
    config = transformers.CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    settings: dict[str, Any] = {"max_new_tokens": NUM_NEW, "do_sample": False}
    expected = plain.generate(prompts(), **settings)
    actual = model.generate(prompts(), **settings, cache_implementation="static", compile_config=config)
    assert torch.equal(actual, expected)
    model.compile(backend="eager")
    model(prompts())  # what is compiled outside of generate() announces its forwards in it
    assert torch.equal(model.generate(prompts(), **settings), expected)


def run_refused(name: str, directory: Path) -> None:
    """On every rank, and the next generate runs."""
    model, plain = spread(name)
    ids = prompts()
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)
    spread_over = "the experts of this MixtralForCausalLM are spread over ranks"
    with pytest.raises(ValueError, match=f"{spread_over}, and continuous batching .*call generate()"):
        model.generate_batch(ids.tolist(), generation_config=config)
    if hasattr(type(model), "continuous_batching_context_manager"):
        with (
            pytest.raises(ValueError, match=f"{spread_over}, and continuous batching"),
            model.continuous_batching_context_manager(generation_config=config),
        ):
            pass
    with pytest.raises(ValueError, match=f"{spread_over}, and continuous batching"):
        model.generate(ids, max_new_tokens=4, cache_implementation="paged")
    with pytest.raises(ValueError, match=f"{spread_over}, and assistant_early_exit"):
        model.generate(ids[:1], max_new_tokens=4, assistant_early_exit=1)

    class Failing(transformers.StoppingCriteria):
        num_steps = 0

        def __call__(self, input_ids: Tensor, scores: object, **_: Any) -> Tensor:
            self.num_steps += 1
            if self.num_steps == 3:
                raise OverflowError("three steps")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    failing: tuple[dict[str, Any], ...] = ({"stopping_criteria": [Failing()]}, {"no_such_setting": 1})
    for settings, kind in zip(failing, (OverflowError, ValueError), strict=True):
        words = "three steps|no_such_setting" if rank == 0 else "failed on another rank"
        with pytest.raises(kind if rank == 0 else tm.TransportError, match=words):
            model.generate(ids, max_new_tokens=8, do_sample=False, **(settings if rank == 0 else {}))
        check(model, plain, ids)
    # one rank does something else
    with pytest.raises(tm.CountMismatch, match="each must call it, and as often" if rank == 0 else "rank"):
        model.generate(ids, max_new_tokens=2) if rank == 0 else model(ids)


def run_meshes(name: str, directory: Path) -> None:
    """Copies of experts, FSDP2 over all ranks, and ranks of the job that have no part in it."""
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "expert"))
    model, plain = spread(name, mesh)
    check(model, plain, prompts())
    everybody = init_device_mesh("cpu", (size,))
    for layer in model.model.layers:
        fully_shard(layer.mlp.experts, mesh=mesh["data"])
        fully_shard(layer, mesh=everybody)
    fully_shard(model, mesh=everybody)
    check(model, plain, prompts())
    some = DeviceMesh("cpu", torch.tensor([[0, 1]]), mesh_dim_names=("data", "expert"))
    if rank < 2:
        check(*spread(name, some), prompts())


def run_ep_implementation(name: str, directory: Path, layout: str) -> None:
    from transformers.distributed import DistributedConfig

    plain: Any = make_model(name).eval()
    if rank == 0:
        plain.save_pretrained(directory / f"ep-{name}")
    dist.barrier()
    tmt.register(OVERLAP)
    sizes = {"tp_size": size} if layout == "tp" else {"fsdp_size": size}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory / f"ep-{name}",
        experts_implementation="tritonmoe",
        distributed_config=DistributedConfig(**sizes, ep_size=2, ep_implementation="tritonmoe"),
    ).eval()
    ids = torch.arange(2, 10).view(2, 4) if layout == "tp" else prompts()
    check(model, plain, ids, 6 if layout == "tp" else NUM_NEW, cache_implementation="static")
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)
    with pytest.raises(ValueError, match="spread over ranks, and continuous batching"):
        model.generate_batch(ids.tolist(), generation_config=config)


CASES = {
    "lengths": run_lengths,
    "grpo": run_grpo,
    "load": run_load,
    "ways": run_ways,
    "stopped": run_stopped,
    "encoder_decoder": run_encoder_decoder,
    "wrapped": run_wrapped,
    "compiled": run_compiled,
    "refused": run_refused,
    "meshes": run_meshes,
    "tp": lambda name, directory: run_ep_implementation(name, directory, "tp"),
    "fsdp": lambda name, directory: run_ep_implementation(name, directory, "fsdp"),
}

if __name__ == "__main__":
    main(CASES)
