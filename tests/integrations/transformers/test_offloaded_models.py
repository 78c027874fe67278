"""Models of transformers whose experts are in files: losses, adapters and texts have the bits of those in memory."""

import copy
from pathlib import Path

import pytest
import torch
from late_device import LateDevice
from torch import Tensor, nn

import tritonmoe as tm
from tritonmoe.integrations import transformers as tmt

pytest.importorskip("transformers", minversion="5.7")
peft = pytest.importorskip("peft")

from transformers import (  # noqa: E402
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(48).view(2, 24)


def make_model(kind: str = "mixtral", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 12,
        "num_experts_per_tok": 2,
    }
    if kind == "mixtral":
        model: nn.Module = MixtralForCausalLM(MixtralConfig(**sizes))
    else:
        model = GptOssForCausalLM(GptOssConfig(**sizes, head_dim=32, layer_types=["full_attention"] * 2))
    model = model.to(dtype)
    model.requires_grad_(False)
    return model


def with_adapters(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[], target_parameters=PARAMETERS))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


def train(model: nn.Module) -> dict[str, Tensor]:
    """Return losses of two steps, and the adapters after them."""
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    losses = []
    for _ in range(2):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), **{n: p.detach() for n, p in model.named_parameters() if p.requires_grad}}


CASES = [
    ("mixtral", torch.bfloat16, None),
    ("mixtral", torch.float32, None),
    ("mixtral", torch.bfloat16, "nf4"),
    ("gpt_oss", torch.bfloat16, "mxfp4"),
    ("gpt_oss", torch.bfloat16, None),
]


@pytest.mark.parametrize("first", ["adapters", "offload"])
@pytest.mark.parametrize(("kind", "dtype", "weight_format"), CASES)
def test_adapters_train_to_the_same_bits(
    kind: str, dtype: torch.dtype, weight_format: str | None, first: str, tmp_path: Path
) -> None:
    model = make_model(kind, dtype)
    tmt.quantize_experts(model, weight_format) if weight_format else tmt.patch(model)  # type: ignore[arg-type]
    offloaded = copy.deepcopy(model)
    resident = train(with_adapters(model))
    if first == "offload":
        tmt.offload_experts(offloaded, tmp_path)
        adapted = with_adapters(offloaded)
    else:
        adapted = with_adapters(offloaded)
        tmt.offload_experts(adapted, tmp_path)
    found = train(adapted)
    assert found.keys() == resident.keys()
    for name, value in resident.items():
        assert torch.equal(value, found[name]), name
    assert len(list(tmp_path.iterdir())) == 2
    if weight_format is None and kind == "mixtral":
        adapted.save_pretrained(tmp_path / "adapters")
        whole = make_model(kind, dtype)
        tmt.patch(whole)
        loaded = peft.PeftModel.from_pretrained(whole, tmp_path / "adapters")
        assert torch.equal(loaded(input_ids=IDS).logits, adapted(input_ids=IDS).logits)
        with pytest.raises(ValueError, match="stays in"):
            adapted.merge_and_unload()


@pytest.mark.parametrize(("kind", "weight_format"), [("mixtral", None), ("gpt_oss", "mxfp4")])
def test_adapters_train_to_the_same_bits_where_copies_are_late(
    kind: str, weight_format: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, from pinned memory, for as long as the test's own device lives."""
    threads = torch.get_num_threads()
    with monkeypatch.context() as patched:
        device = LateDevice()
        device.install(patched)
        model = make_model(kind)
        tmt.quantize_experts(model, weight_format) if weight_format else tmt.patch(model)  # type: ignore[arg-type]
        offloaded = copy.deepcopy(model)
        resident = train(with_adapters(model))
        tmt.offload_experts(offloaded, "cpu", resident_bytes=10_000)
        with device.computing():
            found = train(with_adapters(offloaded))
            offloaded.generate(IDS[:1, :5], max_new_tokens=4, min_new_tokens=4, do_sample=False)
        for name, value in resident.items():
            assert torch.equal(value, found[name]), name
        device.check()
        assert not device.host_waits
    torch.set_num_threads(threads)


def test_texts_are_the_same(tmp_path: Path) -> None:
    model = make_model()
    tmt.patch(model)
    offloaded = copy.deepcopy(model)
    done = tmt.offload_experts(offloaded, tmp_path, resident_bytes=200_000)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        model.generate(IDS, **settings),  # type: ignore[operator]
        offloaded.generate(IDS, **settings),  # type: ignore[operator]
    )
    assert "waited" in str(done)
    with pytest.raises(ValueError, match="save the adapters"):
        offloaded.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    offloaded.set_experts_implementation("eager")  # type: ignore[operator]
    with pytest.raises(ValueError, match="stay in"):
        offloaded(input_ids=IDS)


@pytest.mark.thorough
def test_the_trainer_trains_adapters_with_checkpointing(tmp_path: Path) -> None:
    """Its checkpoints have the adapters, from which it goes on; DataLoader's workers are forks beside the reader."""
    examples = [{"input_ids": IDS[number % 2], "labels": IDS[number % 2]} for number in range(8)]

    def run(model: nn.Module, folder: Path, num_steps: int, **options: object) -> dict[str, Tensor]:
        arguments = TrainingArguments(
            str(folder),
            max_steps=num_steps,
            save_steps=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_num_workers=1,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        Trainer(model, arguments, train_dataset=examples).train(**options)
        return {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}

    found = []
    for is_offloaded in (False, True):
        models = [make_model() for _ in range(2)]
        for number, model in enumerate(models):
            if is_offloaded:
                tmt.offload_experts(model, tmp_path / f"experts{number}")
            else:
                tmt.patch(model)
        folder = tmp_path / f"run{is_offloaded}"
        run(with_adapters(models[0]), folder, 2)
        found.append(run(with_adapters(models[1]), folder, 4, resume_from_checkpoint=True))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_refusals(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="there is none here"):
        tmt.offload_experts(model, "cpu")
    tmt.offload_experts(model, tmp_path)
    with pytest.raises(ValueError, match="already"):
        tmt.offload_experts(model, tmp_path)
    with pytest.raises(ValueError, match="offload_experts"):
        tmt.quantize_experts(model, "nf4")
    with pytest.raises(ValueError, match="offload_experts"):
        model.load_state_dict(make_model().state_dict())
    with pytest.raises(ValueError, match="stay elsewhere since"):
        tmt.set_expert_precision(model, tm.ExpertPrecision("fp8_block"))
    with pytest.raises(TypeError, match="cast the model before"):
        model.float()(input_ids=IDS)
    with pytest.raises((ValueError, TypeError)):
        tmt.offload_experts(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match=r"transformers\.offload_experts"):
        tm.offload_experts(make_model(), tmp_path)


def test_experts_that_loading_has_left_on_the_disk(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    make_model().save_pretrained(tmp_path / "checkpoint")  # type: ignore[operator]
    model = MixtralForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.bfloat16)
    with torch.device("meta"):
        skeleton = MixtralForCausalLM(MixtralConfig.from_pretrained(tmp_path / "checkpoint"))
    device_map = {
        name: "disk" if name.endswith("experts") else "cpu"
        for name, module in skeleton.named_modules()
        if module._parameters or module._buffers
    }
    loaded = MixtralForCausalLM.from_pretrained(
        tmp_path / "checkpoint", dtype=torch.bfloat16, device_map=device_map, offload_folder=tmp_path / "left"
    )
    assert loaded.model.layers[0].mlp.experts.down_proj.is_meta
    tmt.offload_experts(loaded, tmp_path / "experts")
    tmt.patch(model)
    assert torch.equal(model(input_ids=IDS).logits, loaded(input_ids=IDS).logits)
    model.requires_grad_(False)
    loaded.requires_grad_(False)
    whole = train(with_adapters(model))
    for name, value in train(with_adapters(loaded)).items():
        assert torch.equal(value, whole[name]), name
