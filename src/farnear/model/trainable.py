"""Which weights a run trains: all of them, all but some that are frozen, or small adapters beside a frozen model.

Freezing goes by the names of modules. A pattern such as ``visual`` or ``language_model.layers.[0-7]`` is compared with
a module's whole name and, where no whole name matches, with every part of a name that begins at a dot: a vision tower
is ``visual`` whether it hangs in ``0.model`` or in a router.

LoRA (Hu et al. 2021, arXiv:2106.09685) adds to a weight W the product of two thin matrices, (alpha / r) B A, and trains
those alone. peft builds them into the model where its layers are; the model keeps its class and its forward, and
peft's view of it can save the adapter and merge it.

What is not trained has ``requires_grad`` off, and that is all that optimizer, strategies and checkpoints look at.
"""

import dataclasses
import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from farnear.errors import UserError
from farnear.model.towers import freeze_unreached, is_router
from farnear.sections import ModelConfig

if TYPE_CHECKING:  # a plan needs neither the model nor the seconds of this import
    from sentence_transformers.base.model import BaseModel

# Keys of peft.LoraConfig that follow from what is trained here.
OWN_KEYS = (
    "task_type",
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)
# Other ways to begin change the base's weights, and an adapter alone would not fit the base that others have.
INITIALISATIONS = (True, False, "gaussian", "orthogonal")
# About as many elements of a frozen weight stand for it.
_SAMPLE = 1024


def choose_trainable(model: "BaseModel", config: ModelConfig, *, seed: int) -> None:
    """Add the adapters that the section asks for, freeze what it names and what no input reaches; in place.

    Args:
        seed: Of the adapters' random weights, which have to be the same on every rank.

    Raises:
        UserError: A key or a pattern means nothing, or no parameter would be trained.
    """
    if config.lora is not None:
        add_adapters(model, config, seed=seed)
    freeze(model, config.freeze)
    _refuse_frozen_copies(model)
    freeze_unreached(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"model.freeze ({', '.join(config.freeze)}) leaves no parameter to train; take a pattern out of it"
        )


def checkpoint_activations(model: "BaseModel") -> None:
    """Have activations computed again in the backward pass; in place.

    transformers also asks for the gradient of what the embedding layer puts out, which its older way of checkpointing
    needs where the first layers are frozen. This way does not, and the backward pass would go all through them.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.disable_input_require_grads()


def store_frozen_in(dtype: torch.dtype, model: nn.Module) -> None:
    """Keep frozen weights in the type in which autocast computes with them; in place.

    It casts those of linear and convolution layers in every forward, and keeps no cast of a weight that does not
    train: stored so, the numbers are the same, without the cast and in half the memory. Others (norms, embeddings) it
    leaves in fp32, and so does this.
    """
    castable = (nn.Linear, nn.modules.conv._ConvNd)
    used_otherwise = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, castable)
        for parameter in module.parameters(recurse=False)
    }
    for module in model.modules():
        for parameter in module.parameters(recurse=False) if isinstance(module, castable) else ():
            if not parameter.requires_grad and parameter.is_floating_point() and id(parameter) not in used_otherwise:
                parameter.data = parameter.data.to(dtype)


def frozen_hash(model: nn.Module) -> str:
    """What trained weights stand beside, in a few characters: a sample of the frozen weights and adapters' scales.

    Empty where everything is trained. Whether the weights are stored in fp32 or bf16 makes no difference.
    """
    frozen = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if not frozen:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in frozen:
        every = max(1, parameter.numel() // _SAMPLE)
        sample = parameter.detach().flatten()[::every].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
    for name, module in model.named_modules():
        # peft's layers have one scale an adapter.
        if isinstance(scaling := getattr(module, "scaling", None), dict):
            digest.update(f"{name} {sorted(scaling.items())}".encode())
    return digest.hexdigest()


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop the training of every parameter in the modules that a pattern names.

    Raises:
        UserError: A pattern matches no module that has parameters.
    """
    modules = {
        name: module for name, module in model.named_modules() if name and any(True for _ in module.parameters())
    }
    for pattern in patterns:
        names = [name for name in modules if fnmatchcase(name, pattern)]
        names = names or [name for name in modules if any(fnmatchcase(part, pattern) for part in _endings(name))]
        if not names:
            raise UserError(
                f"model.freeze: no module of the model is called '{pattern}'; names near it are "
                f"{', '.join(_near(pattern, list(modules)))}"
            )
        for name in names:
            modules[name].requires_grad_(False)


def add_adapters(model: "BaseModel", config: ModelConfig, *, seed: int) -> Any:
    """Put LoRA layers into the model, in place, and freeze all but them and what `modules_to_save` names.

    A reranker's head is not part of what peft sees. It trains beside the adapters: it may have begun as random numbers.

    Returns:
        peft's view of the model, which can save the adapter and merge it.

    Raises:
        UserError: peft is missing, or cannot do what the section asks for with this model.
    """
    inner: Any = model.transformers_model
    if inner is None:
        raise UserError(f"model.lora: {config.name_or_path} holds no transformers model; take model.lora out")
    if any(is_router(module) for module in model.modules()):
        raise UserError(
            f"model.lora adapts one model, and {config.name_or_path} is a Router of several; take it out, or freeze "
            "what is not to train"
        )
    settings = lora_settings(config)
    from peft import LoraConfig, get_peft_model

    wanted = settings.setdefault("target_modules", linear_layers_of_language_model(inner))
    for name in settings.get("modules_to_save") or ():
        if not any(known == name or known.endswith(f".{name}") for known, _ in inner.named_modules()):
            near = ", ".join(_near(name, [known for known, _ in inner.named_modules() if known]))
            raise UserError(f"model.lora.modules_to_save: no module is called '{name}'; names near it are {near}")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(
                inner, LoraConfig(task_type="FEATURE_EXTRACTION", revision=config.revision, **settings)
            )
        except Exception as error:  # peft checks little itself, so torch and Python complain in their ways
            raise UserError(
                f"model.lora cannot be put into {config.name_or_path} ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}); check its keys, and target_modules ({wanted})"
            ) from error
    # A plan's stand-in for a model is of no type.
    if getattr(model, "model_type", None) == "CrossEncoder":
        for module in list(model)[1:]:
            module.requires_grad_(True)
    return adapted


def lora_settings(config: ModelConfig) -> dict[str, Any]:
    """The arguments of peft.LoraConfig that section `model` holds.

    Raises:
        UserError: peft is missing, or a key is unknown, decided by farnear, or would change the base's weights.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("model.lora needs peft, which is not installed here; pip install peft") from None
    settings = dict(config.lora or {})
    known = [field.name for field in dataclasses.fields(LoraConfig) if field.name not in OWN_KEYS]
    for key in settings:
        if key in OWN_KEYS:
            raise UserError(f"model.lora.{key} follows from what is trained; take it out of the run file")
        if key not in known:
            nearest = ["r"] if key == "rank" else difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean '{nearest[0]}'?" if nearest else f"the keys are {', '.join(known)}"
            raise UserError(f"model.lora.{key} is not a key of peft.LoraConfig; {advice}")
    start = settings.get("init_lora_weights", True)
    if start not in INITIALISATIONS or settings.get("layer_replication"):
        raise UserError(
            "model.lora: "
            + ("layer_replication" if start in INITIALISATIONS else f"init_lora_weights: {start}")
            + " changes the base model itself, so that the adapter alone would not fit the base; take it out"
        )
    return settings


def linear_layers_of_language_model(inner: Any) -> str:
    """A pattern, as peft takes it, of all linear layers of the language model and of none of a tower's.

    Names of layers alone would not do: in Qwen2.5-VL the vision tower has a ``gate_proj`` too.
    """
    decoder = inner.get_decoder()
    names = {id(module): name for name, module in inner.named_modules()}
    prefix = names.get(id(decoder), "")
    leaves = sorted({name.rpartition(".")[2] for name, part in decoder.named_modules() if isinstance(part, nn.Linear)})
    return (re.escape(prefix) + r"\." if prefix else "") + rf"(.*\.)?({'|'.join(map(re.escape, leaves))})"


def _refuse_frozen_copies(model: nn.Module) -> None:
    """A module of `modules_to_save` that `freeze` covers would be saved beside the adapter, and be the base's."""
    for name, module in model.named_modules():
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict) and not any(p.requires_grad for p in copies.parameters()):
            raise UserError(
                f"model.lora.modules_to_save names {name}, but model.freeze freezes it; take it out of one of them "
                "(lora alone freezes everything beside the adapters)"
            )


def _endings(name: str) -> Iterator[str]:
    """The parts of a dotted name that begin after a dot: b.c and c of a.b.c."""
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _near(pattern: str, names: list[str], most: int = 6) -> list[str]:
    """The names that somebody who wrote this pattern may have meant, without the numbers of layers."""
    plain = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
    word = pattern.rpartition(".")[2].strip("*") or pattern

    def likeness(name: str) -> float:
        return max(
            difflib.SequenceMatcher(None, *pair).ratio() for pair in ((pattern, name), (word, name.rpartition(".")[2]))
        )

    return sorted(plain, key=lambda name: (-likeness(name), len(name)))[:most]
