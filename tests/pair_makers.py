"""Pairs of all kinds and tiny bases for rerankers, shared by their tests."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sentence_transformers import CrossEncoder
from torch import Tensor, nn

from farnear.model.tiny import save_tiny_model

YES_NO = ("yes", "no") * 2
# A short one, so that tests are; roles as in farnear's own.
TEMPLATE = (
    "{% macro c(m) %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
    "{% for m in messages %}{% if m.role == 'system' %}I:{{ c(m) }}{% elif m.role == 'query' %}Q:{{ c(m) }}"
    "{% elif m.role == 'document' %}D:{{ c(m) }}{% endif %}{% endfor %}<|im_start|>"
)


def page(width: int, height: int, seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


def mixed_pairs() -> list[tuple[Any, Any]]:
    """Pages of several sizes, two of them in several pairs; a text as a document, images as queries, and both at once.

    One query looks like a path, and there is such a file nowhere.
    """
    red, blue, wide = page(64, 96, 1), page(96, 64, 2), page(160, 64, 3)
    return [
        ("Which page shows revenue?", red),
        ("costs 2019", red),
        ("costs 2019", blue),
        ("x.png", "a text of its own"),
        (blue, wide),
        (red, "what is red"),
        ({"text": "with a page", "image": blue}, {"image": wide, "text": "and words"}),
        ("a longer query than the others have", wide),
    ]


def raw_scores(model: CrossEncoder, pairs: list[tuple[Any, Any]]) -> Tensor:
    return torch.as_tensor(model.predict(pairs, activation_fn=nn.Identity(), convert_to_tensor=True)).cpu()


def make_bases(folder: Path, **keys: Any) -> Path:
    """A base with tied embeddings, one with untied ones, and a chat template."""
    for name, tied in (("tied", True), ("untied", False)):
        save_tiny_model(folder / name, texts=YES_NO, hidden_size=64, num_layers=2, tie_word_embeddings=tied, **keys)
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder
