"""Pages as uint8: the model sees what its processor makes, at an eighth of the bytes; and what a page costs."""

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPProcessor, Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from farnear.model.embedder import Preprocessing, to_device
from farnear.model.load import load_model
from farnear.model.pixels import PixelBytes, page_tokens
from farnear.model.tiny import CHAT_TEMPLATE, save_tiny_model
from farnear.sections import ModelConfig

CPU = torch.device("cpu")
LIMITS = {"min_pixels": 64 * 64, "max_pixels": 256 * 256}

# Width and height. With LIMITS: kept, enlarged, reduced, long either way, one pixel from a multiple of the patch.
SIZES = [(128, 192), (20, 31), (700, 990), (900, 64), (9, 300), (129, 191), (128, 192)]


def page(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Noise over a gradient: every byte value, and no two pages alike."""
    width, height = size
    random = np.random.default_rng([seed, width, height])
    slope = np.linspace(0, 255, width)[None, :, None]
    noise = random.integers(-60, 60, (height, width, 3))
    return Image.fromarray((slope + noise).clip(0, 255).astype(np.uint8))


def pages(sizes: list[tuple[int, int]]) -> list[Any]:
    return [page(size, seed) for seed, size in enumerate(sizes)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Raw checkpoints of three generations, with the patches and the normalisation that each has."""
    root = tmp_path_factory.mktemp("models")
    tiny = save_tiny_model(root / "qwen3-vl", hidden_size=64, num_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    layers = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
    token_ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    tower = {"depth": 1, "hidden_size": 64, "num_heads": 2}
    older: dict[str, tuple[str, dict[str, Any]]] = {
        "qwen2-vl": ("Qwen2VL", {**tower, "embed_dim": 64, "mlp_ratio": 1}),
        "qwen2.5-vl": (
            "Qwen2_5_VL",
            {**tower, "out_hidden_size": 64, "intermediate_size": 64, "fullatt_block_indexes": [0]},
        ),
    }
    for name, (prefix, vision) in older.items():
        config = getattr(transformers, f"{prefix}Config")(
            text_config={"vocab_size": len(tokenizer), **layers, "num_key_value_heads": 2, "rope_parameters": rotary},
            vision_config=vision,
            **token_ids,
        )
        getattr(transformers, f"{prefix}Model")(config).save_pretrained(root / name)
        processor = getattr(transformers, f"{prefix}Processor")(
            image_processor=Qwen2VLImageProcessor(),
            tokenizer=tokenizer,
            video_processor=transformers.Qwen2VLVideoProcessor(),
            chat_template=CHAT_TEMPLATE,
        )
        processor.save_pretrained(root / name)
    return {name: root / name for name in ("qwen3-vl", *older)}


@pytest.fixture
def model(folders: dict[str, Path]) -> SentenceTransformer:
    return load_model(ModelConfig(name_or_path=str(folders["qwen3-vl"]), **LIMITS))


@pytest.fixture(scope="module")
def clip(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    """A model of another family."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(folders["qwen3-vl"])
    layers = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={"vocab_size": len(tokenizer), **layers, **special},
            vision_config={**layers, "image_size": 64, "patch_size": 16},
            projection_dim=32,
        )
    ).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return load_model(ModelConfig(name_or_path=str(folder)))


def assert_same(expected: Any, actual: dict[str, Any], atol: float = 1e-5) -> None:
    """Both are what the model is given: alike to the bit, but for ``pixel_values``."""
    assert list(expected) == list(actual)
    for name, value in expected.items():
        if not isinstance(value, torch.Tensor):
            assert value == actual[name]
            continue
        assert (value.dtype, value.shape) == (actual[name].dtype, actual[name].shape), name
        assert actual[name].is_contiguous()
        assert torch.allclose(value, actual[name], rtol=0, atol=atol if name == "pixel_values" else 0), name


def assert_both_ways_agree(model: SentenceTransformer, *batches: list[Any], side: str = "document") -> None:
    preprocess = Preprocessing(model)
    assert preprocess.pages_as_uint8, preprocess.why_floats
    for inputs in batches:
        features = preprocess(inputs, side)
        assert isinstance(features["pixel_values"], PixelBytes)
        assert features["pixel_values"].patch_PB.dtype == torch.uint8
        assert_same(model.preprocess(inputs, task=side), to_device(features, CPU))


@pytest.mark.parametrize("name", ["qwen3-vl", "qwen2.5-vl", "qwen2-vl"])
def test_pixel_values_are_those_of_the_processor(folders: dict[str, Path], name: str) -> None:
    model = load_model(ModelConfig(name_or_path=str(folders[name]), **LIMITS))
    assert_both_ways_agree(model, *([page(size)] for size in SIZES), pages(SIZES), pages([(128, 192)] * 3))
    # In the size that the checkpoint has of itself.
    assert_both_ways_agree(load_model(ModelConfig(name_or_path=str(folders[name]))), pages(SIZES))


def test_modes_of_images_are_converted_alike(model: SentenceTransformer) -> None:
    assert_both_ways_agree(model, [page((90, 70)).convert(mode) for mode in ("L", "P", "RGBA", "CMYK")])


def test_images_of_queries_and_messages_go_the_same_way(model: SentenceTransformer) -> None:
    assert_both_ways_agree(model, pages([(90, 70), (70, 90)]), side="query")
    assert_both_ways_agree(model, [{"text": "what is this?", "image": page(size)} for size in SIZES[:3]], side="query")
    two = [{"type": "image", "image": page(size)} for size in ((100, 64), (64, 300))]
    one = [{"type": "text", "text": "and this?"}, {"type": "image", "image": page((200, 200))}]
    messages = [[{"role": "user", "content": content}] for content in (two, one)]
    assert_both_ways_agree(model, messages)
    assert Preprocessing(model)(messages, "document")["num_images_per_sample"].tolist() == [2, 1]


def test_text_alone_and_videos_are_left_alone(model: SentenceTransformer) -> None:
    preprocess = Preprocessing(model)
    queries = ["a question", "another, longer question"]
    expected = model.preprocess([{"text": query} for query in queries], task="query")
    assert_same(expected, preprocess(queries, "query"))
    frames = np.stack([np.asarray(page((64, 64), seed)) for seed in range(4)])
    video = {"array": frames, "video_metadata": {"total_num_frames": 4, "fps": 2.0}}
    expected = model.preprocess([{"video": video}], task="document")
    assert "pixel_values_videos" in expected
    assert_same(expected, preprocess([{"video": video}], "document"))
    assert_both_ways_agree(model, [{"video": video, "image": page((90, 70))}])


def test_embeddings_and_gradients_are_the_same(model: SentenceTransformer) -> None:
    def embedding_and_gradient(features: Any) -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        e_nD = model(dict(features))["sentence_embedding"]
        (e_nD * torch.linspace(-1, 1, e_nD.shape[1])).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        (patches,) = [name for name in gradients if "patch_embed" in name and name.endswith("weight")]
        assert gradients[patches].norm() > 1e-3
        return [e_nD.detach(), *gradients.values()]

    inputs = pages(SIZES)
    expected = embedding_and_gradient(model.preprocess(inputs, task="document"))
    actual = embedding_and_gradient(to_device(Preprocessing(model)(inputs, "document"), CPU))
    for one, other in zip(expected, actual, strict=True):
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-5)


CHANGES: list[dict[str, Any]] = [
    {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.5, 0.25]},
    {"do_normalize": False},
    {"do_rescale": False, "image_mean": [100.0, 110.0, 120.0], "image_std": [50.0, 60.0, 70.0]},
    {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0]},
    {"temporal_patch_size": 3},
    {"merge_size": 1, "patch_size": 8},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(changes))
def test_what_the_user_changed_is_respected(folders: dict[str, Path], changes: dict[str, Any]) -> None:
    loaded = load_model(ModelConfig(name_or_path=str(folders["qwen3-vl"]), processor_kwargs=changes, **LIMITS))
    assert_both_ways_agree(loaded, pages(SIZES))
    # Set with the module, a change is passed to every call.
    model = load_model(ModelConfig(name_or_path=str(folders["qwen3-vl"]), **LIMITS))
    image_token = {"patch_size", "merge_size"}  # the text side would read these two elsewhere
    if not image_token & changes.keys():
        model[0].processing_kwargs = {"image": changes}
        assert_both_ways_agree(model, pages(SIZES))
        assert_same(loaded.preprocess(pages(SIZES)), to_device(Preprocessing(model)(pages(SIZES), "document"), CPU))


def test_resizing_can_be_off(folders: dict[str, Path]) -> None:
    model = load_model(ModelConfig(name_or_path=str(folders["qwen3-vl"]), processor_kwargs={"do_resize": False}))
    assert_both_ways_agree(model, pages([(64, 32), (32, 96)]))
    assert page_tokens(model)(np.array([64, 32]), np.array([32, 96])).tolist() == [2, 3]


def test_the_processor_without_torchvision_is_of_the_family(folders: dict[str, Path]) -> None:
    model = load_model(ModelConfig(name_or_path=str(folders["qwen3-vl"])))
    own = model[0].processor.image_processor
    model[0].processor.image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 64 * 64, "longest_edge": 256 * 256}, patch_size=own.patch_size
    )
    assert_both_ways_agree(model, pages(SIZES))


def test_an_image_of_floats_takes_the_own_way(model: SentenceTransformer) -> None:
    floats = [torch.from_numpy(np.array(page((64, 64)))).permute(2, 0, 1) / 255 + 0.001]
    features = Preprocessing(model)(floats, "document")
    assert isinstance(features["pixel_values"], torch.Tensor)
    assert_same(model.preprocess(floats, task="document"), features, atol=0)


def test_another_processor_keeps_its_own_way(clip: SentenceTransformer) -> None:
    preprocess = Preprocessing(clip)
    assert not preprocess.pages_as_uint8
    assert preprocess.why_floats == "CLIPImageProcessor is not of the Qwen2-VL family"
    features = preprocess(pages(SIZES), "document")
    assert_same(clip.preprocess(pages(SIZES), task="document"), features, atol=0)


class OfTheFamilyByName(Qwen2VLImageProcessor):
    """Remote code may change what it inherits."""

    def rescale_and_normalize(self, images: Any, *args: Any) -> Any:
        return super().rescale_and_normalize(images, *args) ** 3


class WithoutOneFrame(Qwen2VLImageProcessor):
    def patchify(self, images: Any, patch_size: int, merge_size: int, temporal_patch_size: int) -> Any:
        if temporal_patch_size != 2:
            raise ValueError("two frames only")
        return super().patchify(images, patch_size, merge_size, temporal_patch_size)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (OfTheFamilyByName, "asked for uint8, the processor gives other pixel_values"),
        (WithoutOneFrame, "WithoutOneFrame cannot be tried (ValueError: two frames only)"),
    ],
)
def test_what_fails_the_trial_keeps_its_own_way(model: SentenceTransformer, kind: type, why: str) -> None:
    old = model[0].processor.image_processor
    model[0].processor.image_processor = kind(size=dict(old.size), patch_size=old.patch_size)
    preprocess = Preprocessing(model)
    assert (preprocess.pages_as_uint8, preprocess.why_floats) == (False, why)
    inputs = pages(SIZES)
    assert_same(model.preprocess(inputs, task="document"), preprocess(inputs, "document"), atol=0)


def host_bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(host_bytes(part) for part in value.values())
    if isinstance(value, PixelBytes):
        return host_bytes(value.patch_PB)
    return value.untyped_storage().nbytes() if isinstance(value, torch.Tensor) else 0


class LargestFloats(TorchDispatchMode):
    """Bytes of the largest floating tensor that any operation gives."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.nbytes = max(self.nbytes, result.numel() * result.element_size())
        return result


def test_a_page_is_an_eighth_of_the_floats_and_never_becomes_floats_in_a_worker(model: SentenceTransformer) -> None:
    preprocess = Preprocessing(model)
    with LargestFloats() as floats:
        features = preprocess(pages(SIZES), "document")
    expected = dict(model.preprocess(pages(SIZES)))
    assert host_bytes(features) <= 0.14 * host_bytes(expected)
    assert floats.nbytes < 1024
    with LargestFloats() as floats:
        model.preprocess(pages(SIZES))
    assert floats.nbytes >= host_bytes(expected["pixel_values"].clone())


def test_preprocessing_and_its_features_are_sent_between_processes(model: SentenceTransformer) -> None:
    there = pickle.loads(pickle.dumps(Preprocessing(model)))
    assert there.pages_as_uint8
    received = pickle.loads(pickle.dumps(there(pages(SIZES), "document")))
    assert_same(model.preprocess(pages(SIZES), task="document"), to_device(received, CPU))


def sizes_to_cost() -> Iterator[tuple[int, int]]:
    random = np.random.default_rng(0)
    yield from SIZES
    # Halves of the step, where rounding is to even, and sizes around the limits.
    yield from ((step * 16, other) for step in range(1, 40, 2) for other in (48, 80, 256))
    yield from ((64 + i, 64 + j) for i in (-1, 0, 1) for j in (-1, 0, 1))
    yield from ((256 + i, 256 + j) for i in (-17, -1, 0, 1, 15, 16, 17) for j in (-1, 0, 1))
    yield from ((2, 400), (400, 2), (1, 200), (3, 600), (20, 4000), (4000, 20))
    yield from ((int(w), int(h)) for w, h in np.exp(random.uniform(np.log(30), np.log(5000), (1500, 2))))


@pytest.mark.parametrize("name", ["qwen3-vl", "qwen2-vl"])
def test_tokens_of_a_page_are_those_of_the_processor(folders: dict[str, Path], name: str) -> None:
    model = load_model(ModelConfig(name_or_path=str(folders[name]), **LIMITS))
    cost = pickle.loads(pickle.dumps(page_tokens(model)))
    image_processor = model[0].processor.image_processor
    w_n, h_n = np.array(list(sizes_to_cost())).T
    tokens_n = cost(w_n, h_n)
    assert tokens_n.dtype == np.int64
    merged = image_processor.merge_size**2
    for w, h, tokens in zip(w_n.tolist(), h_n.tolist(), tokens_n.tolist(), strict=True):
        assert tokens == image_processor.get_number_of_image_patches(h, w) // merged, (w, h)
    # And what counts in the end: placeholders in the text.
    features = model.preprocess(pages(SIZES))
    placeholders = (features["input_ids"] == model[0].config.image_token_id).sum(1)
    assert placeholders.tolist() == tokens_n[: len(SIZES)].tolist()
    assert (features["image_grid_thw"].prod(1) // merged).tolist() == placeholders.tolist()


def test_a_page_that_the_processor_refuses_costs_as_much_as_the_largest(model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match="aspect ratio"):
        model.preprocess([page((1, 201))])
    cost = page_tokens(model)
    refused = cost(np.array([1, 201, 0, 5000]), np.array([201, 1, 300, 24]))
    largest = cost(np.arange(1, 3000), np.arange(1, 3000)).max()
    assert refused.tolist() == [largest] * 4 == [64] * 4


def test_other_processors_get_an_estimate(clip: SentenceTransformer) -> None:
    w_n, h_n = np.array([[10, 64, 64, 1000, 2000], [10, 64, 128, 1000, 100]])
    # 64 x 64 is left of every page, in patches of 16.
    assert page_tokens(clip)(w_n, h_n).tolist() == [16] * 5
    image_processor = clip[0].processor.image_processor
    crop, size = image_processor.do_center_crop, image_processor.size
    try:
        image_processor.do_center_crop = False
        for given, expected in (
            ({"height": 32, "width": 64}, [8] * 5),
            ({"longest_edge": 256}, [1, 16, 32, 256, 256]),
            ({"shortest_edge": 64, "longest_edge": 128}, [16, 16, 32, 32, 32]),
            ({"shortest_edge": 64 * 64, "longest_edge": 512 * 512}, [16, 16, 32, 1024, 781]),
            ({"max_height": 64, "max_width": 128}, [1, 16, 32, 32, 32]),
        ):
            image_processor.size = given
            assert page_tokens(clip)(w_n, h_n).tolist() == expected
    finally:
        image_processor.do_center_crop, image_processor.size = crop, size


def test_limits_of_pixels_are_obeyed_without_a_warning(folders: dict[str, Path], tmp_path: Path) -> None:
    def tokens(**keys: Any) -> int:
        model = load_model(ModelConfig(**{"name_or_path": str(folders["qwen3-vl"]), **keys}))
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            patches = Preprocessing(model)([page((640, 640))], "document")["image_grid_thw"].prod()
        model.save_pretrained(str(tmp_path / "saved"))
        assert "_pixels" not in "".join(file.read_text() for file in (tmp_path / "saved").glob("*.json"))
        assert page_tokens(model)(np.array([640]), np.array([640])).tolist() == [int(patches) // 4]
        return int(patches) // 4

    assert tokens() == 400
    assert tokens(max_pixels=64 * 64) == 4
    assert tokens(min_pixels=1280 * 1280, max_pixels=2560 * 2560) == 1600
    assert tokens(processor_kwargs={"max_pixels": 96 * 96}) == 9
    assert tokens(processor_kwargs={"max_pixels": 96 * 96}, max_pixels=64 * 64) == 4
    size = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    assert tokens(processor_kwargs={"size": size}) == 16
    assert tokens(processor_kwargs={"size": size}, max_pixels=64 * 64) == 4
    # A checkpoint may bring arguments of its own for every call, and more with its tokenizer; the run file is stronger.
    limits = {"processor_kwargs": {"max_pixels": 160 * 160}}
    model = SentenceTransformer(str(folders["qwen3-vl"]), device="cpu", **limits)
    for number, own in enumerate(({"max_pixels": 96 * 96}, {"size": size}, {"size": size, "max_pixels": 96 * 96})):
        model[0].processing_kwargs = {"image": own}
        model.save_pretrained(str(stored := tmp_path / f"stored{number}"))
        assert '"max_pixels": 25600' in (stored / "tokenizer_config.json").read_text()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            features = SentenceTransformer(str(stored), device="cpu").preprocess([page((640, 640))])
        assert tokens(name_or_path=str(stored)) == int(features["image_grid_thw"].prod()) // 4
        assert tokens(name_or_path=str(stored), max_pixels=64 * 64) == 4
        assert tokens(name_or_path=str(stored), processor_kwargs={"max_pixels": 64 * 64}) == 4
