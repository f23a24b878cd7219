"""Text encoders of the `shapes` teachers, in CLIP's and in Gemma-2's format, with word tokenizers made from the captions' own words."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.shapes import words as caption_words
from ..torchvision_repair import repair_torchvision

LENGTH = 24  # tokens of a caption, start and end included; the longest of the track's has 19
WIDTH = 64
DEPTH = 2
HEADS = 4


def words() -> list[str]:
    """Every word of a caption, and the comma, sorted."""
    return sorted([*caption_words(), ","])


def _learned(samples: Sequence[str], **options: Any) -> tuple[dict[str, int], Any]:
    """Vocabulary and merges under which each of `samples` is one token, and every letter, digit and mark has one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    letters = string.ascii_lowercase + string.digits + string.punctuation
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=4096, show_progress=False, **options)
    tokenizer.train_from_iterator([*samples, *letters, *(f"x{letter}" for letter in letters)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [(first, second) for first, second in model["merges"] if "x" not in first]
    used = {*letters, *(first for first, _ in merges), *(first + second for first, second in merges)}
    kept = sorted(token for token in model["vocab"] if len(token.removesuffix("</w>")) == 1 or token in used)
    return {token: number for number, token in enumerate(kept)}, merges


def clip_tokenizer() -> Any:
    """A CLIPTokenizer that knows these words and all letters; the end token is the last of its vocabulary, as CLIP pools there."""
    repair_torchvision()
    from transformers import CLIPTokenizer

    vocabulary, merges = _learned(words(), end_of_word_suffix="</w>")
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[token] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def gemma_tokenizer() -> Any:
    """A GemmaTokenizer that knows these words and all letters."""
    repair_torchvision()
    from transformers import GemmaTokenizer

    vocabulary = {token: number for number, token in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))}
    learned, merges = _learned([*words(), *(f"▁{word}" for word in words())])
    for token in learned:
        vocabulary[token] = len(vocabulary)
    return GemmaTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH, padding_side="right")


def clip_encoder(tokenizer: Any) -> nn.Module:
    """An untrained CLIPTextModel; weights come from the global generator, which the caller seeds."""
    from transformers import CLIPTextConfig, CLIPTextModel

    size = len(tokenizer)
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=size, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        max_position_embeddings=LENGTH, projection_dim=WIDTH, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
    ))  # fmt: skip


def gemma_encoder(tokenizer: Any) -> nn.Module:
    """An untrained Gemma2Model; weights come from the global generator, which the caller seeds."""
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=WIDTH // HEADS, query_pre_attn_scalar=WIDTH // HEADS, max_position_embeddings=512,
        sliding_window=512, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    ))  # fmt: skip


def token_ids(tokenizer: Any, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (n, LENGTH) of captions, padded on the right."""
    found = tokenizer(list(captions), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


def embed(encoder: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states (n, LENGTH, WIDTH), as StableDiffusionPipeline (without a mask) and SanaPipeline (with it) take them."""
    masked = {} if encoder.config.model_type.startswith("clip") else {"attention_mask": mask}
    return encoder(input_ids=ids, **masked)[0]


def seeded(make: Any, seed: int) -> Any:
    """What `make()` builds with the global generator at `seed`, which is then put back."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make()
