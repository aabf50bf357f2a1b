"""Small random CLIP models in the Hub's layout, for a run of configs/suites/clip8.py:tiny.

    python benchmarks/tiny_clip.py runs/tiny_clip

`transformers` writes FOLDER/base, a CLIPModel with a tokenizer that knows letters, and for every
task FOLDER/TASK, a CLIPVisionModel that differs from it a little. They know nothing: a run with
them shows that everything works but the download, and its accuracies mean nothing.
"""

import pathlib
import sys
from collections.abc import Sequence

import tokenizers
import torch
import transformers

from mergejax.data import clip

START, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer() -> tokenizers.Tokenizer:
    """Letters as tokens, between the two that CLIP puts around a text."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate([*letters, START, END])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], unk_token=END))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, words[START]), (END, words[END])]
    )
    return made


def write(folder: pathlib.Path, tasks: Sequence[str], side: int = 32, depth: int = 2) -> None:
    """Writes the base and an expert for each task.

    Args:
        folder: for all of them.
        tasks: names of the experts.
        side: of the images in pixels; patches have half of it.
        depth: blocks of each encoder.
    """
    torch.manual_seed(0)
    words = tokenizer()
    end = words.token_to_id(END)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": depth}
    sizes["num_attention_heads"] = 2
    ends = {"bos_token_id": words.token_to_id(START), "eos_token_id": end}
    text = {**sizes, **ends, "vocab_size": end + 1, "max_position_embeddings": 77}
    vision = {**sizes, "image_size": side, "patch_size": side // 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = transformers.CLIPModel(config)
    model.save_pretrained(folder / "base")
    words.save(str(folder / "base" / "tokenizer.json"))
    base = model.vision_model.state_dict()
    for task in tasks:
        expert = transformers.CLIPVisionModel(config.vision_config)
        moved = {
            name: value if name.endswith("position_ids") else value + 0.02 * torch.randn_like(value)
            for name, value in (
                (name, base[name.removeprefix("vision_model.")]) for name in expert.state_dict()
            )
        }
        expert.load_state_dict(moved)
        expert.save_pretrained(folder / task)


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]), clip.protocol(20))
