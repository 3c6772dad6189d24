"""A patch embedding as a product: what the convolution gives, forwards and backwards, and nothing else is touched."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from farnear.model.embedder import Preprocessing, to_device
from farnear.model.load import load_model
from farnear.model.patches import PatchConv3d, multiply_patches
from farnear.model.tiny import save_tiny_model
from farnear.sections import ModelConfig

CPU = torch.device("cpu")


def forward_and_gradients(conv: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    conv.zero_grad()
    y = conv(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert x.grad is not None
    return [
        y.detach(),
        x.grad,
        *(parameter.grad.clone() for parameter in conv.parameters() if parameter.grad is not None),
    ]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(2, 4, 6), (4, 8, 7)])  # one window; several, which stay a convolution
def test_the_product_gives_what_the_convolution_gives(size: tuple[int, int, int], bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(3, 5, (2, 4, 6), stride=(2, 4, 1), bias=bias, dtype=torch.float64)
    x = torch.randn(7, 3, *size, dtype=torch.float64)
    expected = forward_and_gradients(conv, x)
    multiply_patches(conv)
    assert type(conv) is PatchConv3d
    for ours, theirs in zip(forward_and_gradients(conv, x), expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_convolution_that_is_more_than_a_product_is_left_alone() -> None:
    class Own(nn.Conv3d):
        pass

    others = [
        Own(4, 4, 2),
        nn.Conv3d(4, 4, 2, padding=1),
        nn.Conv3d(4, 4, 2, padding="same"),
        nn.Conv3d(4, 4, 2, dilation=2),
        nn.Conv3d(4, 4, 2, groups=2),
        nn.Conv2d(4, 4, 2),
    ]
    kinds = [type(module) for module in others]
    multiply_patches(nn.ModuleList(others))
    assert [type(module) for module in others] == kinds


def test_under_autocast_it_computes_in_its_type() -> None:
    conv = nn.Conv3d(3, 5, 2)
    multiply_patches(conv)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.randn(4, 3, 2, 2, 2)).dtype is torch.bfloat16


def test_a_loaded_model_multiplies_and_is_otherwise_what_sentence_transformers_loads(tmp_path: Path) -> None:
    raw = save_tiny_model(tmp_path / "raw", hidden_size=64, num_layers=2)
    load_model(ModelConfig(name_or_path=str(raw))).save(str(tmp_path / "base"))
    ours = load_model(ModelConfig(name_or_path=str(tmp_path / "base")))
    theirs = SentenceTransformer(str(tmp_path / "base"), device="cpu")
    assert [type(module) for module in ours.modules() if isinstance(module, nn.Conv3d)] == [PatchConv3d]
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in theirs.state_dict().items()}

    pages = [Image.radial_gradient("L").resize(size).convert("RGB") for size in ((96, 64), (64, 160))]
    features = Preprocessing(ours)(pages, "document")
    gradients = []
    for model in (ours, theirs):
        embedding = model.train()(to_device(features, CPU))["sentence_embedding"]
        (embedding * torch.linspace(-1, 2, embedding.numel()).view_as(embedding)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()
    assert gradients[1].norm() > 0
