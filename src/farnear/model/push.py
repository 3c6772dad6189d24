"""An export to the hub: looked at first, whole and with a licence, then sent as it lies in its folder.

Nothing of farnear sends anything anywhere but this, when a person asks for it. What is sent is the export's own list of
files (`farnear.export_folder`): a folder that holds anything else is refused rather than published with it.

A push that breaks off can be repeated. The hub keeps what has arrived and is not sent it again, and a commit is made
of whole files only.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farnear.errors import UserError
from farnear.export_folder import CARD, whole_export
from farnear.files import replace_text
from farnear.offline import is_offline
from farnear.run_folder import RunFolder

REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_NO_BRANCH = re.compile(r"[\s~^:?*\[\\]|\.\.|^[-/]|[/.]$")


@dataclass(frozen=True)
class Parcel:
    """An export that may be published.

    Attributes:
        files: Bytes of each, by its path in the folder.
        license: As its card says.
    """

    folder: Path
    files: dict[str, int]
    license: str


def parcel_of(path: Path) -> Parcel:
    """The export in a folder, or in a run folder.

    Raises:
        UserError: There is none, it is not whole or holds other files, or its card names no licence.
    """
    run = RunFolder(path)
    folder = run.export if run.config.is_file() and run.export.is_dir() else path
    files = whole_export(folder)
    license_name = _metadata(folder).get("license")
    if not isinstance(license_name, str) or license_name.lower() in ("", "unknown"):
        raise UserError(
            f"the card of {folder} names no licence, and a model without one may be used by nobody; make it again with "
            f"`farnear export RUN OUT card.license=apache-2.0`, or write it into {folder / CARD}"
        )
    return Parcel(folder, files, license_name)


def refuse_unless_possible(repo_id: str, revision: str | None, *, create_pr: bool) -> None:
    """Raise UserError where the hub need not be asked to know that it would refuse."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if not REPO_ID.fullmatch(repo_id):
        raise UserError(f"--repo-id {repo_id} is no name on the hub; write NAME/REPO")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--repo-id {repo_id} is no name on the hub ({' '.join(str(error).split())[:200]})") from None
    if revision is not None and (not revision or _NO_BRANCH.search(revision)):
        raise UserError(f"--revision {revision!r} cannot be the name of a branch; take letters, digits, - and /")
    if create_pr and revision is not None:
        raise UserError("--create-pr asks for a change of the main branch, and --revision names another; drop one")


def push(
    parcel: Parcel, repo_id: str, *, private: bool = False, revision: str | None = None, create_pr: bool = False
) -> str:
    """Create the repository if there is none, and commit the export's files to it.

    The card's code is made to load the model from there, in the folder too, which afterwards equals what was sent.

    Args:
        private: Of a repository that is made; one that is public already is refused.
        revision: A branch, made if there is none; None for main.
        create_pr: Propose the commit instead.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        UserError: There is no token or no network, or the hub refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    if is_offline():
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, where there is a network")
    if get_token() is None:
        raise UserError("there is no token for the hub; run `hf auth login`, or set HF_TOKEN to one that may write")
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise UserError(
                f"{repo_id} is public already, so --private would publish the model all the same; make it private on "
                "the hub, or name another repository"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        _name_in_card(parcel.folder / CARD, repo_id)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=parcel.folder,
            allow_patterns=sorted(parcel.files),
            # Weights of a push before, in other files, could be loaded in place of these.
            delete_patterns=["model*.safetensors", "model*.safetensors.index.json"],
            revision=revision,
            create_pr=create_pr,
            commit_message="Model exported by farnear",
        )
    except UserError:
        raise
    except Exception as error:  # of the hub's client, of the network under it, of its threads
        raise UserError(
            f"{parcel.folder} was not pushed to {repo_id} ({_reason(error)}); what has arrived is kept: the same "
            "command goes on. Check the token's rights (HF_TOKEN), the name and the network"
        ) from error
    return str(commit.pr_url if create_pr else commit.commit_url)


def _metadata(folder: Path) -> dict[str, Any]:
    from huggingface_hub.repocard import metadata_load

    try:
        return dict(metadata_load(folder / CARD) or {})
    except Exception as error:  # of YAML, or of what is none
        raise UserError(
            f"the metadata at the head of {folder / CARD} cannot be read ({' '.join(str(error).split())[:200]}); mend "
            "them"
        ) from None


def _name_in_card(path: Path, repo_id: str) -> None:
    from farnear.model.card import with_model_id

    text = path.read_text(encoding="utf-8")
    named = with_model_id(text, repo_id)
    if named != text:
        replace_text(path, named)


def _reason(error: BaseException) -> str:
    """In one line; the client's threads wrap what they met."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
