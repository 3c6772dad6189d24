"""From trained weights to a folder that ``SentenceTransformer`` or ``CrossEncoder`` loads, and other tools too.

The base model is loaded afresh on the CPU and given the trained weights, so an export is the same under every strategy
and needs no GPU. What users of the base rely on survives: the type of the stored weights, prompts, pooling, pixel
limits, the architecture's name, and the names of the weights. sentence-transformers stores the inner model, whose names
lack the prefix that the base checkpoint has (`model.language_model...`), and inference servers look for those.

Adapters (LoRA) are merged into the weights they stand beside, so that the folder needs no peft; `adapter/` inside of it
holds them alone, in peft's own format and in fp32.

`farnear.json` lists the files, so that whoever publishes the folder sees what is missing in it or was added. The card,
README.md, is farnear's own; those that the libraries would write know less.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Dense
from torch import Tensor

from farnear.errors import UserError
from farnear.export_folder import CARD, LIST, files_of
from farnear.files import give_usual_mode, sync, sync_tree
from farnear.model.hub import is_folder
from farnear.model.load import cast_weights, load_model
from farnear.model.load_reranker import load_plain_reranker
from farnear.model.stored import StoredModel, describe_base
from farnear.model.towers import unreached
from farnear.model.trainable import add_adapters, freeze, frozen_hash
from farnear.reranker_section import RerankerConfig
from farnear.sections import ModelConfig


def export_model(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    folder: Path,
    reranker: RerankerConfig | None = None,
    *,
    card: str | None = None,
    frozen: str | None = None,
) -> None:
    """Write the trained model; an export that stands there already is replaced when the new one is complete.

    Args:
        config: Section `model` of the run file: which base, how loaded.
        weights: Trained parameters by their names in the `SentenceTransformer` or `CrossEncoder`, any float type.
        folder: Target.
        reranker: Section `reranker`, where the model is one.
        card: The text of README.md; None leaves it out.
        frozen: What stands for the weights that were not trained (`farnear.model.trainable.frozen_hash`), to be
            compared with those of the base as it is now; None where nobody needs to ask.

    Raises:
        UserError: The base's weights are not those that were trained beside.
    """
    base = describe_base(config)
    # Nothing is computed here, so no attention has to be installed.
    plain = config.model_copy(update={"attn_implementation": None})
    model: BaseModel = load_model(plain) if reranker is None else load_plain_reranker(plain, reranker)
    adapted = add_adapters(model, config, seed=0) if config.lora is not None else None
    freeze(model, config.freeze)
    if frozen is not None and frozen_hash(model) != frozen:
        raise UserError(
            f"the frozen weights of {config.name_or_path} are not those that the model was trained beside; set "
            "model.name_or_path and model.revision as they were when the run began"
        )
    _, unexpected = model.load_state_dict(dict(weights), strict=False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    left_out = tuple(unreached(model))
    lost = {name for name in trained - weights.keys() if not _is_within(name, left_out)}
    if lost or unexpected:
        raise RuntimeError(
            f"weights do not fit the base model: missing {sorted(lost)[:3]}, unexpected {unexpected[:3]}"
        )
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    if adapted is not None:
        # Whether the vocabulary has grown, which decides about saving the embedding layer, peft would ask the hub.
        adapted.save_pretrained(str(fresh / "adapter"), save_embedding_layers=False)
        (fresh / "adapter" / CARD).unlink(missing_ok=True)
        if is_folder(config.name_or_path):
            _name_base(fresh / "adapter" / "adapter_config.json", Path(config.name_or_path))
        for path in (fresh / "adapter").glob("*.safetensors"):
            give_usual_mode(path)
        adapted.merge_and_unload(safe_merge=True)
    # A Dense layer comes up as fp32 in sentence-transformers, whatever is stored, and takes nothing else.
    has_dense = reranker is None and any(isinstance(module, Dense) for module in model.modules())
    cast_weights(model, torch.float32 if has_dense else base.dtype)
    model.save_pretrained(str(fresh), create_model_card=False)
    for stored in base.models:
        _restore_names(fresh / stored.folder, stored)
    if card is not None:
        (fresh / CARD).write_text(card, encoding="utf-8")
    files = {name: size for name, size in files_of(fresh).items() if name != CARD}
    (fresh / LIST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    sync_tree(fresh)
    if folder.exists():
        old = _former(folder)
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        os.rename(fresh, folder)
        shutil.rmtree(old)
    else:
        os.rename(fresh, folder)
    sync(folder.parent)


def heal_export(folder: Path) -> None:
    """Put back what a run had taken away when it was killed, in between the two renames of an export's replacement."""
    if not folder.exists() and _former(folder).exists():
        os.rename(_former(folder), folder)


def _former(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def _is_within(name: str, owners: tuple[str, ...]) -> bool:
    return any(name == owner or name.startswith(f"{owner}.") for owner in owners)


def _name_base(adapter_config: Path, base: Path) -> None:
    """By its folder's name: an export may be published, and where the base is on this machine is nobody's business."""
    settings = json.loads(adapter_config.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = base.resolve().name
    adapter_config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _restore_names(folder: Path, base: StoredModel) -> None:
    config_file = folder / "config.json"
    if base.architectures and config_file.exists():
        settings = json.loads(config_file.read_text(encoding="utf-8"))
        settings["architectures"] = list(base.architectures)
        config_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    renamed: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            metadata = file.metadata()
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in names}
        renamed.update({name: _name_in_base(name, base) for name in names})
        save_file({renamed[name]: tensor for name, tensor in tensors.items()}, path, metadata=metadata)
        give_usual_mode(path)
    index_file = folder / "model.safetensors.index.json"
    if index_file.exists():
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index["weight_map"] = {renamed[name]: file for name, file in index["weight_map"].items()}
        index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _name_in_base(name: str, base: StoredModel) -> str:
    if name in base.weight_names:
        return name
    candidates = [known for known in base.weight_names if known.endswith(f".{name}")]
    return candidates[0] if len(candidates) == 1 else name
