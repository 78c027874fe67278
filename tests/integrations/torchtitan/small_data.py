"""A tokenizer and texts for torchtitan's debug models, which its wheel leaves out."""

import json
import random
from pathlib import Path

__all__ = ["write_small_data"]


def write_small_data(directory: Path) -> None:
    """Write them to the folders `tokenizer` and `texts`."""
    special = ["<bos>", "<eos>", "<unk>"]
    added = [{"id": n, "content": word, "special": True, "normalized": False} for n, word in enumerate(special)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    words = {word: number for number, word in enumerate([*special, *map(str, range(1000))])}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [one | flags for one in added],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    (directory / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(names))
    generator = random.Random(0)
    (directory / "texts").mkdir()
    with (directory / "texts" / "data.json").open("w") as file:
        for _ in range(200):
            step = generator.randrange(1, 9)
            text = " ".join(str((step * place + generator.randrange(3)) % 1000) for place in range(150))
            file.write(json.dumps({"text": text}) + "\n")
