"""Models on the hub: brought into its cache ahead of a run, and asked for there without a network."""

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from farnear.errors import UserError
from farnear.offline import PREFETCH, is_offline
from farnear.sections import ModelConfig

# The weights once more, for other libraries, and as pickles where there are safetensors. Modules in folders of their
# own keep all their files: sentence-transformers asks for such a folder as a whole.
OTHER_FORMATS = re.compile(r"[^/]*\.(h5|msgpack|ot|onnx|gguf)|(onnx|openvino|original)/.*")
PICKLES = re.compile(r"pytorch_model[^/]*\.bin(\.index\.json)?|consolidated[^/]*\.pth")
MODULES = "modules.json"
_PATIENCE_SECONDS = 20.0


@dataclass(frozen=True)
class HubFiles:
    """Files of a model on the hub that loading it may read.

    Attributes:
        commit: That the revision stands for.
        ignored: Names of the other files.
        there, missing: Bytes of each file that is in the cache, and of each that is not.
    """

    commit: str
    ignored: tuple[str, ...]
    there: tuple[int, ...]
    missing: tuple[int, ...]


def is_folder(name: str) -> bool:
    """Whether a model is one on disk."""
    return Path(name).exists()


def refuse_missing_folder(name: str) -> None:
    """A name that can only be a folder is not looked for on the hub, which takes minutes without a network."""
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)
    path = Path(name).expanduser()
    if not is_hub_name and not path.exists():
        raise UserError(f"there is no model folder {os.path.abspath(path)}; set model.name_or_path")


def refuse_absent(config: ModelConfig) -> None:
    """Raise ``UserError`` for a model that is no folder here and cannot be had from the hub either."""
    refuse_missing_folder(config.name_or_path)
    refuse_unless_fetched(config)


def refuse_unless_fetched(config: ModelConfig) -> None:
    """Raise ``UserError`` for a model that is not here, where it cannot be had either.

    Without a network that is one of which the hub's cache does not know whether it has modules. A download that was
    made otherwise may lack modules.json where the hub has it, and the model would then be taken for a raw one, with a
    pooling that is not its own, without a word. And a hub that does not answer is asked once: loading would ask for one
    file after another, for minutes, and then say that there is no such model.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    name = config.name_or_path
    if is_folder(name) or try_to_load_from_cache(name, MODULES, constants.HF_HUB_CACHE, config.revision) is not None:
        return
    why = PREFETCH if is_offline() else _silence_of_the_hub(config)
    if why is not None:
        revision = f" at revision {config.revision}" if config.revision else ""
        raise UserError(
            f"model {name}{revision} cannot be loaded: no folder of that name is here, and it is not in the "
            f"hub's cache {constants.HF_HUB_CACHE}. {why}"
        )


def _silence_of_the_hub(config: ModelConfig) -> str | None:
    """Why it cannot be asked; None where it answers, whatever that is."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().model_info(config.name_or_path, revision=config.revision, timeout=_PATIENCE_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return None
    except Exception as error:  # of the network, by whatever client
        return (
            f"The hub cannot be asked ({type(error).__name__}: {' '.join(str(error).split())[:160]}); correct the name "
            "if a folder is meant, or run `farnear prefetch RUN.yaml` where there is a network"
        )
    return None


def look_up(config: ModelConfig) -> HubFiles:
    """What ``fetch`` would bring. Asks the hub.

    Raises:
        UserError: The hub cannot be asked, or does not know the model.
    """
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(config.name_or_path, revision=config.revision, dry_run=True)
    except Exception as error:
        raise _refused(config, error) from error
    if not found:
        raise UserError(f"model {config.name_or_path} on the hub holds no file; check name and model.revision")
    without_pickles = config.model_kwargs.get("use_safetensors") is not False and any(
        re.fullmatch(r"[^/]*\.safetensors", file.filename) for file in found
    )
    ignored = tuple(
        file.filename
        for file in found
        if OTHER_FORMATS.fullmatch(file.filename) or (without_pickles and PICKLES.fullmatch(file.filename))
    )
    read = [file for file in found if file.filename not in ignored]
    return HubFiles(
        commit=found[0].commit_hash,
        ignored=ignored,
        there=tuple(file.file_size or 0 for file in read if file.is_cached),
        missing=tuple(file.file_size or 0 for file in read if not file.is_cached),
    )


def fetch(config: ModelConfig, files: HubFiles) -> None:
    """Bring the files into the hub's cache. What a killed process has brought stays. Errors as ``look_up``."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        # By the revision's name, so that the cache knows the name too.
        snapshot_download(config.name_or_path, revision=config.revision, ignore_patterns=list(files.ignored))
        with suppress(EntryNotFoundError):  # from now on the cache knows that there is none
            hf_hub_download(config.name_or_path, MODULES, revision=config.revision)
    except Exception as error:
        raise _refused(config, error) from error


def _refused(config: ModelConfig, error: Exception) -> UserError:
    revision = f" at revision {config.revision}" if config.revision else ""
    return UserError(
        f"model {config.name_or_path}{revision} cannot be fetched ({type(error).__name__}: "
        f"{' '.join(str(error).split())[:300]}); check name, model.revision, the network, and for a gated or private "
        "model HF_TOKEN"
    )
