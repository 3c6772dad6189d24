"""Whether the attention that the run file chooses can be computed here, asked before a model is loaded.

transformers would say so too, but late, or not at all: where flash attention is missing and the package `kernels` is
installed, it downloads a compiled kernel from the hub and runs that (`_check_and_adjust_attn_implementation` in its
modeling_utils.py). Here that takes a key in the run file.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available, is_kernels_available

from farnear.errors import UserError
from farnear.model.attention import VARLEN
from farnear.sections import ModelConfig

# What makes transformers fetch compiled code from the hub, beside the name of an attention.
KERNEL_SWITCHES = ("use_kernels", "kernel_config", "allow_all_kernels")
INSTALLATION = {
    "flash_attention_2": "with torch installed: pip install flash-attn --no-build-isolation",
    "flash_attention_3": "it is built from the folder hopper of https://github.com/Dao-AILab/flash-attention",
}


def check_attention(config: ModelConfig, device: torch.device, *, half_precision: bool) -> None:
    """Raise UserError where the chosen attention cannot be computed here, before a model is loaded.

    Args:
        config: Section `model` of the run file.
        device: Where the model will compute.
        half_precision: Whether it will compute in bf16.
    """
    name = config.attn_implementation
    if name in (None, "eager", "sdpa") or (name == VARLEN and device.type == "cpu"):
        return
    what = f"model.attn_implementation: {name}"
    if device.type != "cuda":
        raise UserError(f"{what} runs on an NVIDIA GPU only, and this run is on {device.type}; set sdpa")
    if name == "flex_attention":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise UserError(f"{what} needs a GPU of compute capability 8.0, and this one has {major}.{minor}; set sdpa")
    if not half_precision:
        raise UserError(f"{what} computes in half precision only; set training.bf16, or attn_implementation: sdpa")
    if name == VARLEN and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        raise UserError(f"{what} needs torch 2.11, and this is {torch.__version__}; install a newer torch, or set sdpa")


def refuse_kernels(config: ModelConfig, stored: Mapping[str, Any]) -> None:
    """Raise UserError where a package is missing, or loading would make transformers fetch compiled code from the hub.

    Args:
        config: Section `model` of the run file.
        stored: The checkpoint's config.json.
    """
    if "attn_implementation" in config.model_kwargs:
        raise UserError(
            "model.model_kwargs holds attn_implementation, which has a key of its own; write model.attn_implementation"
        )
    if config.attn_implementation in INSTALLATION:
        _refuse_missing_package(config.attn_implementation, config.allow_kernel_download)
    if config.allow_kernel_download:
        return
    for key in KERNEL_SWITCHES:
        if config.model_kwargs.get(key):
            raise UserError(
                f"model.model_kwargs.{key} lets transformers download compiled kernels from the hub and run them; take "
                "it out, or set model.allow_kernel_download: true"
            )
    if config.attn_implementation is None:
        for name in _named_attentions(stored):
            if "/" in name or "flash" in name:
                raise UserError(
                    f"the config.json of model {config.name_or_path} asks for the attention {name}, which may come "
                    "from the hub as compiled code; set model.attn_implementation, such as sdpa"
                )


def _refuse_missing_package(name: str, allow_kernel_download: bool) -> None:
    is_there = is_flash_attn_2_available() if name == "flash_attention_2" else is_flash_attn_3_available()
    if is_there:
        return
    what = (
        f"model.attn_implementation: {name} is not installed here ({INSTALLATION[name]}); install it, or set varlen or "
        "sdpa"
    )
    if not allow_kernel_download:
        raise UserError(
            what + "; model.allow_kernel_download: true lets transformers download a compiled kernel in its place"
        )
    if not is_kernels_available():
        raise UserError(f"{what}; model.allow_kernel_download needs the package kernels: pip install kernels")


def _named_attentions(tree: Mapping[str, Any]) -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _named_attentions(value)
        elif key in ("attn_implementation", "_attn_implementation") and isinstance(value, str):
            yield value
