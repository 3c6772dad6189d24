"""Mini-batches put together: the same embeddings as apart, whatever their lengths and the side that is padded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from farnear.model.embedder import Preprocessing, to_device
from farnear.model.features import CannotMergeError, FeatureMerger
from farnear.model.load import load_model
from farnear.model.tiny import save_tiny_model
from farnear.sections import ModelConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "base", hidden_size=64, num_layers=2)


@pytest.fixture
def model(base: Path) -> SentenceTransformer:
    return load_model(ModelConfig(name_or_path=str(base)))


def embed(model: SentenceTransformer, features: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(to_device(features, CPU))["sentence_embedding"]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("side", ["query", "document"])
def test_together_they_have_the_embeddings_that_they_have_apart(
    model: SentenceTransformer, side: str, padding_side: str
) -> None:
    model.tokenizer.padding_side = padding_side
    groups: list[list[Any]] = [["a", "b c d e f g h"], ["one", "two words"], ["a longer query than all others here"]]
    if side == "document":
        groups = [[Image.new("RGB", size, "red") for size in sizes] for sizes in (((64, 64), (96, 128)), ((160, 64),))]
    preprocess = Preprocessing(model)
    apart = [preprocess(inputs, side) for inputs in groups]
    together = FeatureMerger(model)(apart)
    expected = torch.cat([embed(model, features) for features in apart])
    assert torch.allclose(embed(model, together), expected, atol=1e-5)
    # What is left alone would be seen.
    assert not torch.allclose(embed(model, apart[0])[:1], expected[1:2], atol=1e-3)


def test_what_cannot_be_put_together_is_refused(model: SentenceTransformer) -> None:
    merge = FeatureMerger(model)
    mask = torch.ones(1, 3)
    with pytest.raises(CannotMergeError, match="feature lengths is a tuple"):
        merge([{"attention_mask": mask, "lengths": (3,)}, {"attention_mask": mask, "lengths": (4,)}])
    with pytest.raises(CannotMergeError, match="different features"):
        merge([{"attention_mask": mask}, {"attention_mask": mask, "pixel_values": mask}])
    merged = merge(
        [{"attention_mask": mask, "prompt": "p", "ids": [1]}, {"attention_mask": mask, "prompt": "p", "ids": [2]}]
    )
    assert merged["prompt"] == "p" and merged["ids"] == [1, 2] and merged["attention_mask"].shape == (2, 3)
