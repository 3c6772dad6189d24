"""A vision-language model of a few million random weights, made on the spot.

The demo and the tests need a model that has every part of the ones people train (a vision tower with deepstack, image
placeholders in the token stream, three-axis rotary positions, a chat template, a processor) and that learns on a CPU
within minutes. So this module writes a Qwen3-VL of toy size to a folder, together with a byte-level tokenizer trained
on a few sentences, in the layout that a hub checkpoint has. ``SentenceTransformer(folder)`` and farnear's own loading
see no difference from a real one. ``farnear tiny FOLDER`` writes one from a shell.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Weights of 1 / sqrt(hidden size) learn from scratch within a hundred steps; the 0.02 of large models does not.
INITIALIZER_RANGE = 0.08

# One turn a message, as the Qwen family writes them; the closing <|im_end|> is what last-token pooling reads.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
)


def save_tiny_model(
    folder: str | os.PathLike[str],
    *,
    texts: Iterable[str] = (),
    hidden_size: int = 128,
    num_layers: int = 3,
    attention_dropout: float = 0.0,
    vocab_size: int | None = None,
    tie_word_embeddings: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a tiny raw Qwen3-VL (no pooling modules) with random weights.

    Args:
        folder: Where the checkpoint goes; created.
        texts: Sentences the tokenizer is trained on beside the printable bytes. What occurs twice becomes one token:
            ``("yes", "no") * 2`` for a reranker.
        hidden_size: Width of both towers; a multiple of 32.
        num_layers: Layers of the vision tower and of the language model, each.
        attention_dropout: Dropout probability of the language model's attention.
        vocab_size: Rows of the embedding layer, as many as a large model's, most of them unused; None: the
            tokenizer's.
        tie_word_embeddings: Whether the language-model head is the embedding layer.
        dtype: Type of the stored weights.
        seed: Of the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(texts)
    token_id = {token: int(tokenizer.vocab[token]) for token in SPECIAL_TOKENS}
    head_dim = 32
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": max(vocab_size or 0, len(tokenizer)),
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": hidden_size // head_dim,
            "num_key_value_heads": hidden_size // head_dim,
            "head_dim": head_dim,
            "max_position_embeddings": 4096,
            "attention_dropout": attention_dropout,
            "initializer_range": INITIALIZER_RANGE,
            # The three sections (time, height, width) share the head's rotary frequencies: they sum to head_dim / 2.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
            "tie_word_embeddings": tie_word_embeddings,
            "bos_token_id": None,
            "eos_token_id": token_id["<|im_end|>"],
            "pad_token_id": token_id["<|endoftext|>"],
        },
        vision_config={
            "depth": num_layers,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_heads": hidden_size // head_dim,
            "out_hidden_size": hidden_size,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0],
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=token_id["<|image_pad|>"],
        video_token_id=token_id["<|video_pad|>"],
        vision_start_token_id=token_id["<|vision_start|>"],
        vision_end_token_id=token_id["<|vision_end|>"],
        tie_word_embeddings=tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Qwen3VLForConditionalGeneration(config)
    model.to(dtype=dtype).save_pretrained(folder)
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 640 * 640}
    patches = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels, **patches),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=pixels, **patches),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


def _train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
        model_max_length=4096,
    )
