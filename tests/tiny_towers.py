"""Tiny checkpoints with random weights of the shapes that people train beside vision-language models.

Text encoders, dual encoders (CLIP, SigLIP, CLAP) and a model of all modalities, each written as its hub checkpoint is:
raw, or as a SentenceTransformer. They are what a Router joins, and what run files of examples are tried with.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
IMAGE_SIDE = 32
PATCH_SIDE = 8
TEXT_LENGTH = 64
AUDIO_RATE = 48_000


def save_tiny_text_encoder(folder: Path, *, hidden_size: int = 32, as_sentence_transformer: bool = True) -> Path:
    """A BERT, like all-MiniLM: mean pooling and normalisation where it is a SentenceTransformer."""
    raw = folder if not as_sentence_transformer else folder.with_name(f"{folder.name}-raw")
    tokenizer = _tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=TEXT_LENGTH, pad_token_id=0, **_layers(hidden_size)
    )
    _save(raw, transformers.BertModel, config, tokenizer)
    if as_sentence_transformer:
        encoder = Transformer(str(raw))
        modules = [encoder, Pooling(encoder.get_embedding_dimension(), "mean"), Normalize()]
        SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))
    return folder


def save_tiny_clip(folder: Path, *, projection_dim: int = 48, as_sentence_transformer: bool = False) -> Path:
    """A CLIP. Its scale is a single number that no embedding depends on."""
    tokenizer = _tokenizer()
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": TEXT_LENGTH, **_layers(32), **special}
    config = transformers.CLIPConfig(text_config=text, vision_config=_vision(32), projection_dim=projection_dim)
    processor = transformers.CLIPProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
        ),
        tokenizer=tokenizer,
    )
    return _save(folder, transformers.CLIPModel, config, processor, as_sentence_transformer)


def save_tiny_siglip(folder: Path, *, hidden_size: int = 48, as_sentence_transformer: bool = False) -> Path:
    """A SigLIP, or a SigLIP 2 of fixed size, which is the same: its tokenizer gives no mask, and it reads the last token."""
    tokenizer = _tokenizer(model_input_names=["input_ids"])
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": TEXT_LENGTH, **_layers(hidden_size)}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "projection_size": hidden_size}
    config = transformers.SiglipConfig(text_config=text, vision_config=_vision(hidden_size))
    processor = transformers.SiglipProcessor(
        image_processor=transformers.SiglipImageProcessor(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}),
        tokenizer=tokenizer,
    )
    return _save(folder, transformers.SiglipModel, config, processor, as_sentence_transformer)


def _save(
    folder: Path, kind: type, config: Any, processor: Any, as_sentence_transformer: bool = False, seed: int = 0
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = kind(config)
    # Weights of 0.02, as for large models, give embeddings that hardly differ.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "position" not in name:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if as_sentence_transformer:
        SentenceTransformer(modules=[Transformer(str(folder))], device="cpu").save_pretrained(str(folder))
    return folder


def _layers(hidden_size: int) -> dict[str, int]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }


def _vision(hidden_size: int) -> dict[str, int]:
    return {"image_size": IMAGE_SIDE, "patch_size": PATCH_SIDE, **_layers(hidden_size)}


def _tokenizer(texts: Sequence[str] = (), **keys: Any) -> transformers.PreTrainedTokenizerFast:
    """By bytes; each text ends in </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
        **keys,
    )
