"""Inputs as shards hold them, in the form in which a model's ``preprocess`` takes them.

- A bare text that looks like a path or a URL would be opened as an image: it says that it is a text.
- A feature extractor takes one rate, so audio is resampled to the model's.
- In chat messages sentence-transformers takes bare arrays where elsewhere it takes a dict of an array and what is known
  of it. What is known of videos goes beside, as an argument of the call.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from farnear.model.towers import reader_of


def given_to(model: Any, inputs: Sequence[Any], side: str) -> tuple[list[Any], dict[str, Any]]:
    """Inputs of one kind, and arguments of ``preprocess``, for a model and a side."""
    are_texts = all(isinstance(one, str) for one in inputs)
    if are_texts and not hasattr(reader_of(model, side, "text"), "modality_config"):
        # What only tokenizes takes bare texts, and opens none. Its Router is told what they are.
        return list(inputs), {"modality": "text"}
    rate = rate_of(reader_of(model, side, _kind_of(inputs[0])))
    taken = [{"text": one} if isinstance(one, str) else _at_rate(one, rate) for one in inputs]
    videos = [part["video"] for one in taken for part in _parts_of_messages(one) if part["type"] == "video"]
    for part in (part for one in taken for part in _parts_of_messages(one)):
        kind = part["type"]
        if isinstance(value := part.get(kind), dict):
            part[kind] = value["array"]
    return taken, {"processing_kwargs": {"video": {"video_metadata": list(map(_known_of, videos))}}} if videos else {}


def rate_of(reader: Any) -> int | None:
    """Samples a second that a module's feature extractor takes; None where it says nothing."""
    processor = getattr(reader, "processor", None)
    rate = getattr(getattr(processor, "feature_extractor", processor), "sampling_rate", None)
    return None if rate is None else int(rate)


def resampled(audio: dict[str, Any], rate: int) -> dict[str, Any]:
    """Audio ``{"array": float32 [samples], "sampling_rate": Hz}`` at another rate."""
    if audio["sampling_rate"] == rate:
        return audio
    import av

    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio["array"], np.float32)[None], "flt", "mono")
    frame.sample_rate = audio["sampling_rate"]
    resampler = av.AudioResampler("flt", "mono", rate)
    parts = [part.to_ndarray()[0] for part in (*resampler.resample(frame), *resampler.resample(None))]
    return {"array": np.concatenate(parts), "sampling_rate": rate}


def _kind_of(one: Any) -> str:
    """As far as it matters for audio."""
    if isinstance(one, list):
        return "message"
    return "+".join(one) if isinstance(one, dict) else "text"


def _at_rate(one: Any, rate: int | None) -> Any:
    """An input with its audio at a rate; messages are copied, for they are changed afterwards."""
    if isinstance(one, list):
        return [_at_rate(part, rate) for part in one]
    if not isinstance(one, dict):
        return one
    if "sampling_rate" in one:
        return one if rate is None else resampled(one, rate)
    return {name: _at_rate(value, rate) for name, value in one.items()}


def _parts_of_messages(one: Any) -> Iterator[dict[str, Any]]:
    for message in one if isinstance(one, list) else ():
        yield from message["content"] if isinstance(message["content"], list) else ()


def _known_of(video: dict[str, Any]) -> dict[str, Any]:
    frames = len(video["array"])
    unknown = {"total_num_frames": frames, "fps": None, "duration": None, "frames_indices": list(range(frames))}
    return video["video_metadata"] or unknown
