"""Features of pairs: what predict would make, each image once, and mini-batches of any jobs' pairs."""

import pickle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from pair_makers import make_bases, mixed_pairs, page, raw_scores
from sentence_transformers import CrossEncoder
from test_pixels import folders  # noqa: F401
from torch import Tensor

from farnear.model.embedder import to_device
from farnear.model.features import CannotMergeError
from farnear.model.image_features import images_apart
from farnear.model.load_reranker import load_reranker
from farnear.model.pairs import PairPicker, PairPreprocessing, image_features_of_job, pick_images
from farnear.model.pixels import PixelBytes
from farnear.model.reranker import Reranker, same_scores_shared, shares_images
from farnear.reranker_section import RerankerConfig
from farnear.sections import ModelConfig

CPU = torch.device("cpu")
PAIRS = mixed_pairs()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module", params=["yes_no", "linear"])
def model(request: pytest.FixtureRequest, bases: Path) -> CrossEncoder:
    section = RerankerConfig(
        head=request.param, instruction="Find the page", chat_template=str(bases / "template.jinja")
    )
    return load_reranker(ModelConfig(name_or_path=str(bases / "tied")), section).eval()


@torch.no_grad()
def forward(model: CrossEncoder, features: dict[str, Any]) -> Any:
    return Reranker(model, bf16=False)(to_device(features, CPU))


def plain_scores(model: CrossEncoder) -> Tensor:
    return raw_scores(model, PAIRS)


def test_features_are_those_of_predict(model: CrossEncoder) -> None:
    preprocess, wanted = PairPreprocessing(model, shares_images=False), plain_scores(model)
    assert preprocess.pages_as_uint8, preprocess.why_floats
    assert torch.allclose(forward(model, preprocess(PAIRS)), wanted, atol=1e-5)
    assert len(wanted.unique()) == len(PAIRS)
    # Without the prompt they would be others.
    with patch.object(model, "default_prompt_name", None):
        other = PairPreprocessing(model, shares_images=False)(PAIRS)
    assert not torch.allclose(forward(model, other), wanted, atol=1e-3)


def test_a_text_that_names_a_picture_is_a_text(model: CrossEncoder, tmp_path: Path) -> None:
    path = str(tmp_path / "page.png")
    page(64, 64, 0).save(path)
    for shares in (False, True):
        features = PairPreprocessing(model, shares_images=shares)([(path, path)])
        assert "pixel_values" not in features
        assert features["input_ids"].shape[1] > 2 * len(path) / 4


def test_each_image_is_processed_once(model: CrossEncoder) -> None:
    preprocess = PairPreprocessing(model, shares_images=True)
    features, plain = preprocess(PAIRS), PairPreprocessing(model, shares_images=False)(PAIRS)
    assert features["image_of_occurrence"].tolist() == [0, 0, 1, 1, 2, 0, 1, 2, 2]
    assert features["num_images_per_sample"].tolist() == [1, 1, 1, 0, 2, 1, 2, 1]
    assert features["distinct_grid_thw"].tolist() == [[1, 6, 4], [1, 4, 6], [1, 4, 10]]
    assert isinstance(features["pixel_values"], PixelBytes)
    assert len(features["pixel_values"].patch_PB) == 24 + 24 + 40
    for name in plain.keys() - {"pixel_values"}:
        same = features[name] == plain[name]
        assert same.all() if isinstance(same, Tensor) else same, name
    occurrences = [(0, int(image)) for image in features["image_of_occurrence"]]
    assert torch.equal(pick_images([features], occurrences)["pixel_values"].patch_PB, plain["pixel_values"].patch_PB)
    assert torch.equal(image_features_of_job(features)["image_grid_thw"], features["distinct_grid_thw"])
    # The processor is its own again, and a copy elsewhere does the same.
    assert type(model[0].processor.image_processor).__name__.startswith("Qwen2VL")
    elsewhere = pickle.loads(pickle.dumps(preprocess))(PAIRS)
    assert torch.equal(elsewhere["pixel_values"].patch_PB, features["pixel_values"].patch_PB)
    assert torch.equal(elsewhere["input_ids"], features["input_ids"])


def test_equal_images_that_are_two_objects_are_two(model: CrossEncoder) -> None:
    pairs = [("a", page(64, 64, 0)), ("b", page(64, 64, 0))]
    assert len(PairPreprocessing(model, shares_images=True)(pairs)["distinct_grid_thw"]) == 2


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_mini_batches_of_any_jobs_have_the_scores_of_predict(bases: Path, padding_side: str) -> None:
    head = "yes_no" if padding_side == "left" else "linear"
    section = RerankerConfig(head=head, instruction="Find", chat_template=str(bases / "template.jinja"))
    model = load_reranker(ModelConfig(name_or_path=str(bases / "tied")), section).eval()
    model.tokenizer.padding_side = padding_side
    preprocess, pick = PairPreprocessing(model, shares_images=True), PairPicker(model)
    # The last job has no image.
    cuts = [PAIRS[0:3], PAIRS[4:8], [PAIRS[3]]]
    place_of = [*((0, i) for i in range(3)), (2, 0), *((1, i) for i in range(4))]
    jobs = [preprocess(pairs) for pairs in cuts]
    assert "pixel_values" not in jobs[2]
    module = Reranker(model, bf16=False)
    with torch.no_grad():
        images = {}
        for j in (0, 1):
            seen = module(to_device(image_features_of_job(jobs[j]), CPU))
            images.update({(j, i): one for i, one in enumerate(images_apart(seen, jobs[j]["distinct_grid_thw"]))})
        assert {one.dtype for one in images.values()} == {torch.float32}
        assert images[0, 0].shape == (6, 2 * 64)  # embeddings, and those of the one deepstack layer
        wanted = plain_scores(model)
        for batch in ([7, 0, 3], [4, 5, 6, 1], [3], [2], list(range(8))):
            features, occurrences = pick(jobs, [place_of[i] for i in batch])
            assert "pixel_values" not in features
            with patch.object(
                model.transformers_model.model.visual if head == "yes_no" else model.transformers_model.visual,
                "forward",
                side_effect=AssertionError,
            ):
                shared = tuple(images[one] for one in occurrences)
                scores = module({**to_device(features, CPU), "image_features": shared})
            assert torch.allclose(scores, wanted[batch], atol=1e-5), batch
            # Nothing is longer than its longest pair.
            assert features["attention_mask"].sum(1).max() == features["attention_mask"].shape[1]
            whole = {**features, **pick_images(jobs, occurrences)}
            assert torch.allclose(module(to_device(whole, CPU)), wanted[batch], atol=1e-5), batch
        wrong = tuple(images[0, 0] if one == (0, 1) else images[one] for one in occurrences)
        assert {len(one) for one in wrong} == {6, 10}
        assert not torch.allclose(module({**features, "image_features": wrong}), wanted, atol=1e-3)


@pytest.mark.parametrize("generation", ["qwen2-vl", "qwen2.5-vl"])
def test_older_generations_share_their_images_too(
    folders: dict[str, Path],  # noqa: F811
    bases: Path,
    generation: str,
) -> None:
    """Without deepstack; their windows and patches are others."""
    section = RerankerConfig(head="linear", chat_template=str(bases / "template.jinja"))
    model = load_reranker(ModelConfig(name_or_path=str(folders[generation])), section)
    assert shares_images(model)
    preprocess, module = PairPreprocessing(model, shares_images=True), Reranker(model, bf16=False)
    assert same_scores_shared(module, preprocess, PairPicker(model), CPU, tolerance=1e-5)
    assert forward(model, image_features_of_job(preprocess(PAIRS))).shape[1] == 64


def test_what_cannot_be_regrouped_is_refused(model: CrossEncoder) -> None:
    pick = PairPicker(model)
    job = PairPreprocessing(model, shares_images=True)([("a", "b"), ("c", "d e f")])
    with pytest.raises(CannotMergeError, match="feature odd is by neither pair nor token"):
        pick([{**job, "odd": torch.zeros(5)}], [(0, 0)])
    with pytest.raises(CannotMergeError, match=r"feature logits_to_keep is a int|feature modality is a str"):
        pick([job, {**job, "modality": "x", "logits_to_keep": 0}], [(0, 0), (1, 0)])
    with pytest.raises(CannotMergeError, match="feature odd is not in every job"):
        pick([job, {**job, "odd": torch.zeros(2)}], [(0, 0), (1, 0)])


def test_a_model_is_tried_before_its_images_are_shared(model: CrossEncoder) -> None:
    assert shares_images(model)
    module, pick = Reranker(model, bf16=False), PairPicker(model)
    preprocess = PairPreprocessing(model, shares_images=True)
    assert same_scores_shared(module, preprocess, pick, CPU)
    assert not same_scores_shared(module, PairPreprocessing(model, shares_images=False), pick, CPU)

    def of_another(features: dict[str, Any]) -> Any:
        if shared := features.get("image_features"):
            features = {**features, "image_features": tuple(2 * one for one in shared)}
        return module(features)

    assert not same_scores_shared(of_another, preprocess, pick, CPU)
    inner: Any = model.transformers_model
    whole = inner.get_image_features

    def not_apart(*inputs: Any, **features: Any) -> Any:
        outputs = whole(*inputs, **features)
        outputs.pooler_output = (torch.cat(outputs.pooler_output),)
        return outputs

    with patch.object(inner, "get_image_features", not_apart):
        assert not same_scores_shared(module, preprocess, pick, CPU)
    with pytest.raises(RuntimeError, match="as the tower's forward has put them together"):
        Reranker(model, bf16=False)({**preprocess([("a", "b")]), "image_features": (torch.zeros(6, 128),)})
