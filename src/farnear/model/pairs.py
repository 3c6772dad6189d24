"""From pairs of a query and a document to features, and mini-batches put together anew from several workers' results.

A worker prepares pairs as they come, in *jobs*: some lists' pairs at a time. A page that stands in several of a job's
pairs is the same decoded object there, and goes through the image processor once: the processor is handed the distinct
images, and told the grids of all occurrences, from which it makes the placeholders in the texts. So pixels are made,
sent and held once an image, while everything else is what it would be without.

A mini-batch is then any pairs of any jobs, cut to their own lengths and padded again (`PairPicker`), and its images are
those of the jobs (`pick_images`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modality import infer_modality
from torch import Tensor

from farnear.model.embedder import WorkerPreprocessing
from farnear.model.features import CannotMergeError, TokenPadding
from farnear.model.pixels import PixelBytes

Pair = tuple[Any, Any]
OfJob = tuple[int, int]
"""(job, which of its pairs, or of its distinct images)."""

# An entry for each image occurrence; what else there is has one for each pair, or for each token.
_OF_OCCURRENCE = ("image_grid_thw",)
_OF_JOB = ("pixel_values", "distinct_grid_thw", "image_of_occurrence")


class PairPreprocessing(WorkerPreprocessing):
    """From pairs to features, with the model's default prompt, as `CrossEncoder.predict` prepares them.

    Args:
        model: As loaded, before a strategy has it.
        shares_images: Whether an image that stands in several pairs of a call, as the same object, is processed once.
            ``pixel_values`` then holds the distinct images in the order in which they first appear, and
            ``num_images_per_sample`` int64 [pairs] is always there. Two features are added where there are images and
            the processor tells their grids: ``distinct_grid_thw`` int64 [distinct, 3] and ``image_of_occurrence``
            int64 [occurrences], in the order of the pairs and the query's before the document's. May be set later.
    """

    def __init__(self, model: CrossEncoder, *, shares_images: bool) -> None:
        super().__init__(model)
        self._prompt = model.prompts.get(model.default_prompt_name) if model.default_prompt_name else None
        self.shares_images = shares_images
        first: Any = model[0]
        # A bare string that looks like a path or a URL would be opened as an image. Where there are no structured
        # messages a pair of strings is text.
        self._wraps_texts = "message" in first.modality_config and first.input_formatter.message_format == "structured"

    def __call__(self, pairs: Sequence[Pair], side: str = "pair") -> dict[str, Any]:
        """Features of pairs; ``side`` is "pair", for the sake of those who also call `Preprocessing`."""
        inputs = [tuple(self._input(one) for one in pair) for pair in pairs]
        call = partial(self._model.preprocess, inputs, prompt=self._prompt)
        if not self.shares_images:
            return self._features(call)
        images_n = [[image for one in pair for image in _images_of(one)] for pair in pairs]
        images = [image for of_pair in images_n for image in of_pair]
        place_of = {identity: place for place, identity in enumerate(dict.fromkeys(map(id, images)))}
        image_of_occurrence = torch.tensor([place_of[id(image)] for image in images], dtype=torch.int64)
        with _each_image_once(self._model[0].processor, image_of_occurrence) as processor:
            features = self._features(call)
        # sentence-transformers may count them itself, but not always.
        features["num_images_per_sample"] = torch.tensor([len(of_pair) for of_pair in images_n])
        if processor.distinct_grid_thw is not None:
            features.update(distinct_grid_thw=processor.distinct_grid_thw, image_of_occurrence=image_of_occurrence)
        return features

    def _input(self, one: Any) -> Any:
        return {"text": one} if isinstance(one, str) and self._wraps_texts else one


def _images_of(one: Any) -> list[Any]:
    """The images of a query or a document, in the order in which messages hold them."""
    if isinstance(one, dict):
        images = one.get("image")
        return [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
    return [one] if not isinstance(one, str) and infer_modality(one) == "image" else []


class _OncePerImage:
    """An image processor that is asked for occurrences and processes each distinct image once."""

    def __init__(self, image_processor: Any, image_of_occurrence: Tensor) -> None:
        self._image_processor = image_processor
        self._image_of_occurrence = image_of_occurrence.tolist()
        self.distinct_grid_thw: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._image_processor, name)

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        flat = [image for entry in images for image in (entry if isinstance(entry, (list, tuple)) else [entry])]
        if len(flat) != len(self._image_of_occurrence):
            raise RuntimeError(f"the processor was given {len(flat)} images of {len(self._image_of_occurrence)}")
        first = {image: place for place, image in reversed(list(enumerate(self._image_of_occurrence)))}
        outputs = self._image_processor([flat[first[image]] for image in sorted(first)], *args, **kwargs)
        # Without grids there would be no telling which of the pixels are whose: as many occurrences as images then.
        if "image_grid_thw" in outputs:
            self.distinct_grid_thw = torch.as_tensor(outputs["image_grid_thw"])
            outputs["image_grid_thw"] = self.distinct_grid_thw[self._image_of_occurrence]
        elif len(first) < len(flat):
            outputs = self._image_processor(images, *args, **kwargs)
        return outputs


@contextmanager
def _each_image_once(processor: Any, image_of_occurrence: Tensor) -> Iterator[_OncePerImage]:
    whole = processor.image_processor
    processor.image_processor = _OncePerImage(whole, image_of_occurrence)
    try:
        yield processor.image_processor
    finally:
        processor.image_processor = whole


class PairPicker:
    """Makes mini-batches' features, without pixels, of any pairs of any jobs.

    Args:
        model: Whose `PairPreprocessing` made them.
    """

    def __init__(self, model: CrossEncoder) -> None:
        self._padded = TokenPadding(model)

    def __call__(
        self, features_j: Sequence[dict[str, Any]], picks: Sequence[OfJob]
    ) -> tuple[dict[str, Any], list[OfJob]]:
        """One mini-batch's features, and (job, distinct image) of each of its image occurrences in order.

        Args:
            features_j: Of each job, made with ``shares_images``.
            picks: (job, pair in it) of each pair of the mini-batch.

        Raises:
            CannotMergeError: A feature is neither a tensor by pair or by token nor the same in all jobs.
        """
        jobs = [features_j[job] for job in dict.fromkeys(job for job, _ in picks)]
        names = dict.fromkeys(name for features in jobs for name in features if name not in _OF_JOB)
        occurrences = [(job, occurrence) for job, pair in picks for occurrence in _occurrences(features_j[job], pair)]
        picked = {}
        for name in names:
            if name in _OF_OCCURRENCE:
                if occurrences:
                    picked[name] = torch.stack([features_j[job][name][place] for job, place in occurrences])
            else:
                picked[name] = self._picked(name, features_j, picks)
        images = [(job, int(features_j[job]["image_of_occurrence"][place])) for job, place in occurrences]
        return picked, images

    def _picked(self, name: str, features_j: Sequence[dict[str, Any]], picks: Sequence[OfJob]) -> Any:
        if any(name not in features_j[job] for job, _ in picks):
            raise CannotMergeError(f"feature {name} is not in every job")
        values = {job: features_j[job][name] for job, _ in picks}
        first = next(iter(values.values()))
        if not isinstance(first, Tensor):
            if all(value == first for value in values.values()):
                return first
            raise CannotMergeError(f"feature {name} is a {type(first).__name__}")
        mask_of = {job: features_j[job]["attention_mask"] for job in values}
        if all(value.shape[:2] == mask_of[job].shape for job, value in values.items()):
            rows = [values[job][pair][mask_of[job][pair].bool()] for job, pair in picks]
            longest = max(map(len, rows))
            return torch.cat([self._padded(name, row[None], longest) for row in rows])
        if all(value.ndim and len(value) == len(mask_of[job]) for job, value in values.items()):
            return torch.stack([values[job][pair] for job, pair in picks])
        raise CannotMergeError(f"feature {name} is by neither pair nor token")


def _occurrences(features: dict[str, Any], pair: int) -> range:
    """Places of a pair's images among all occurrences of its job."""
    counts = features["num_images_per_sample"]
    start = int(counts[:pair].sum())
    return range(start, start + int(counts[pair]))


def image_features_of_job(features: dict[str, Any]) -> dict[str, Any]:
    """What the vision tower takes of a job: its distinct images, ``pixel_values`` and ``image_grid_thw``."""
    return {"pixel_values": features["pixel_values"], "image_grid_thw": features["distinct_grid_thw"]}


def pick_images(features_j: Sequence[dict[str, Any]], images: Sequence[OfJob]) -> dict[str, Any]:
    """What the vision tower takes of any images, or a mini-batch of pairs beside its other features.

    Args:
        features_j: Of each job, with shared images.
        images: (job, distinct image in it); may be the same more than once.

    Returns:
        ``pixel_values``, floats or `PixelBytes` as in the jobs, and ``image_grid_thw`` int64 [images, 3]; nothing where
        there are no images.
    """
    if not images:
        return {}
    patches_of: dict[int, tuple[Tensor, ...]] = {}
    for job in {job for job, _ in images}:
        pixels = features_j[job]["pixel_values"]
        patch_P = pixels.patch_PB if isinstance(pixels, PixelBytes) else pixels
        patches_of[job] = patch_P.split(features_j[job]["distinct_grid_thw"].prod(-1).tolist())
    patches = torch.cat([patches_of[job][image] for job, image in images])
    first = features_j[images[0][0]]["pixel_values"]
    return {
        "pixel_values": PixelBytes(patches, first.normalisation) if isinstance(first, PixelBytes) else patches,
        "image_grid_thw": torch.stack([features_j[job]["distinct_grid_thw"][image] for job, image in images]),
    }
