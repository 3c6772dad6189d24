"""Tiny checkpoints with random weights of the shapes that people train beside vision-language models.

Text encoders, dual encoders (CLIP, SigLIP, CLAP) and a model that also hears, each written as its hub checkpoint is:
raw, or as a SentenceTransformer. They are what a Router joins; `joined` names a text encoder and a SigLIP as a run file
does, for an example with its models replaced.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
IMAGE_SIDE, PATCH_SIDE = 32, 8
TEXT_LENGTH = 64
AUDIO_RATE = 8000

# Of a model that hears: a token for each place in a chat.
PLACES = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part.type == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif part.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}</s>{% endfor %}"
)


def joined(folder: Path) -> dict[str, dict[str, str]]:
    """Section `model` of a run file: a text encoder and a SigLIP of another width, made in the folder."""
    text, image = save_tiny_text_encoder(folder / "text"), save_tiny_siglip(folder / "image")
    return {"router": {"text": str(text), "image": str(image)}}


def save_tiny_text_encoder(
    folder: Path, *, hidden_size: int = 32, dropout: float = 0.0, as_sentence_transformer: bool = True
) -> Path:
    """A BERT, like all-MiniLM: mean pooling and normalisation where it is a SentenceTransformer."""
    raw = folder if not as_sentence_transformer else folder.with_name(f"{folder.name}-raw")
    tokenizer = tiny_tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=TEXT_LENGTH,
        pad_token_id=0,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **_layers(hidden_size),
    )
    _save(raw, transformers.BertModel, config, tokenizer)
    if as_sentence_transformer:
        encoder = Transformer(str(raw))
        modules = [encoder, Pooling(encoder.get_embedding_dimension(), "mean"), Normalize()]
        SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))
    return folder


def save_tiny_clip(folder: Path, *, projection_dim: int = 48, as_sentence_transformer: bool = False) -> Path:
    """A CLIP. Its scale is a single number that no embedding depends on."""
    tokenizer = tiny_tokenizer()
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
    """A SigLIP, or a SigLIP 2 of fixed size, which is the same: no mask, and the last token is read."""
    tokenizer = tiny_tokenizer(model_input_names=["input_ids"])
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": TEXT_LENGTH, **_layers(hidden_size)}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "projection_size": hidden_size}
    config = transformers.SiglipConfig(text_config=text, vision_config=_vision(hidden_size))
    processor = transformers.SiglipProcessor(
        image_processor=transformers.SiglipImageProcessor(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}),
        tokenizer=tokenizer,
    )
    return _save(folder, transformers.SiglipModel, config, processor, as_sentence_transformer)


def save_tiny_clap(folder: Path) -> Path:
    """A CLAP: texts and sounds at `AUDIO_RATE`."""
    tokenizer = tiny_tokenizer()
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": TEXT_LENGTH + 8, **_layers(32), "pad_token_id": 0}
    audio = {
        "num_mel_bins": 16,
        "spec_size": 64,
        "window_size": 4,
        "depths": (1, 1),
        "num_attention_heads": (2, 2),
        "patch_embeds_hidden_size": 16,
        "hidden_size": 32,
        "num_hidden_layers": 2,
    }
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=32)
    extractor = transformers.ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=AUDIO_RATE,
        max_length_s=1,
        hop_length=160,
        fft_window_size=256,
        frequency_max=AUDIO_RATE // 2,
        truncation="rand_trunc",
        padding="repeatpad",
    )
    processor = transformers.ClapProcessor(feature_extractor=extractor, tokenizer=tokenizer)
    return _save(folder, transformers.ClapModel, config, processor)


def save_tiny_omni(folder: Path, *, hidden_size: int = 64) -> Path:
    """The thinker of a Qwen2.5-Omni, raw: texts, images, videos, and sounds at 16 kHz."""
    plain = tiny_tokenizer(special_tokens=PLACES.values())
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens=PLACES,
        model_max_length=4096,
    )
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in PLACES.items()}
    text = {
        "vocab_size": len(tokenizer),
        **_layers(hidden_size),
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
    }
    vision = {"depth": 1, "hidden_size": hidden_size, "intermediate_size": hidden_size, "num_heads": 2}
    audio = {
        "num_mel_bins": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": hidden_size,
        "d_model": hidden_size,
        "max_source_positions": 100,
        "n_window": 50,
        "output_dim": hidden_size,
    }
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=text,
        vision_config={**vision, "out_hidden_size": hidden_size, "fullatt_block_indexes": [0]},
        audio_config=audio,
        image_token_index=ids["image_token"],
        video_token_index=ids["video_token"],
        audio_token_index=ids["audio_token"],
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
    )
    size = {"shortest_edge": 56 * 56, "longest_edge": 84 * 84}
    processor = transformers.Qwen2_5OmniProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=size),
        video_processor=transformers.Qwen2VLVideoProcessor(size=size),
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    return _save(folder, transformers.Qwen2_5OmniThinkerForConditionalGeneration, config, processor)


def _save(
    folder: Path, kind: type, config: Any, processor: Any, as_sentence_transformer: bool = False, seed: int = 0
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = kind(config)
    # Weights as large as those of large models give embeddings that hardly differ.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
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


def tiny_tokenizer(special_tokens: Iterable[str] = (), **keys: Any) -> transformers.PreTrainedTokenizerFast:
    """By bytes; each text ends in </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=[*SPECIAL_TOKENS, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((), trainer)
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
