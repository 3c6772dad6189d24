"""The patch embedding of a vision tower as the matrix product that it is.

Towers of the Qwen family get their pages cut into patches already, and embed each with a ``Conv3d`` whose kernel is
as large as the patch: one window, nothing to slide over, a row times a matrix. Libraries of convolutions have no good
algorithm for that. On a CPU it is four to six times slower than the product, a fifth of a small model's step; on a GPU
in bf16 it may take seconds a call, depending on the versions of torch and cuDNN (not measured here;
github.com/huggingface/transformers/issues/45750).

transformers can replace the layer at loading (its ``fusion_config``), which gives the weight another shape and another
name in everything that names weights: adapters, checkpoints, exports. Here the layer stays what it is, with its weight,
its name and its hooks, and only multiplies where it would convolve.
"""

from torch import Tensor, nn
from torch.nn.functional import linear


class PatchConv3d(nn.Conv3d):
    """A ``Conv3d`` without padding, dilation and groups, for inputs that are one window each, and any others."""

    def forward(self, input: Tensor) -> Tensor:
        """[n, C, t, h, w] to [n, D, 1, 1, 1] where t, h, w is the kernel; else as ``Conv3d``."""
        if tuple(input.shape[2:]) != self.kernel_size:
            return super().forward(input)
        return linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def multiply_patches(model: nn.Module) -> None:
    """Let the model's convolutions that may be given single windows compute them as a product; in place."""
    for module in model.modules():
        # Exactly this class: what others have derived from it is theirs.
        if type(module) is nn.Conv3d and _is_product_of_window(module):
            module.__class__ = PatchConv3d


def _is_product_of_window(module: nn.Conv3d) -> bool:
    is_plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    return is_plain and not isinstance(module.padding, str) and set(module.padding) == {0}
