"""`farnear push`: what it sends to a hub, and what it refuses to send."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_to_push_to import LARGE, TOKEN, Repository, WritableHub, writable_hub

from farnear.cli import main
from farnear.export_folder import CARD, LIST, files_of
from farnear.model.export import export_model
from farnear.model.load import load_model
from farnear.model.tiny import save_tiny_model
from farnear.sections import ModelConfig

CODE = '```python\nmodel = SentenceTransformer("{}")\nmodel = SentenceTransformer("{}", truncate_dim=16)\n```\n'
WORDS = f"---\nlicense: apache-2.0\n---\n\n# A model\n\n{CODE}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    config = ModelConfig(name_or_path=str(save_tiny_model(folder / "base", hidden_size=32, num_layers=1)))
    export_model(config, dict(load_model(config).named_parameters()), folder / "export", card=WORDS.format("e", "e"))
    return folder / "export"


@pytest.fixture
def export(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "export"))


@pytest.fixture
def hub(network: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    """That this process knows, with a token for it."""
    from huggingface_hub import constants

    with writable_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        # It would take over this process's threads.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_of(folder)}


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a mistake."""
    text = capsys.readouterr().err
    assert text.startswith("farnear: error: ") and text.count("\n") == 1, text
    return text


@pytest.mark.parametrize("protocol", ["lfs", "xet"])
def test_what_arrives_is_the_folder_byte_for_byte(export: Path, tmp_path: Path, protocol: str) -> None:
    """As a person runs it, by HF_ENDPOINT."""
    if protocol == "xet":
        pytest.importorskip("hf_xet")
    with writable_hub() as hub:
        hub.xet_folder = str(tmp_path / "xet")
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1" if protocol == "lfs" else "0"}
        command = [sys.executable, "-m", "farnear", "push", str(export), "--repo-id", "ada/pages", "--private"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.endswith(f"{hub.url}/ada/pages/commit/{1:040x}\n")
        assert "licence apache-2.0, to ada/pages, a private repository" in ended.stdout
        repository = hub.repositories["ada/pages"]
        assert repository.private
        sent = contents(export)
        if protocol == "xet":  # what is known of a large file is its hash
            sent |= {name: sha256(data) for name, data in sent.items() if name.endswith(LARGE)}
            assert not hub.arrived("PUT")
        assert repository.branches["main"] == sent
        assert {"README.md", LIST, "model.safetensors", "1_Pooling/config.json"} <= repository.branches["main"].keys()
        # The code in the card loads it from there, in the folder too.
        assert (export / CARD).read_text() == WORDS.format("ada/pages", "ada/pages")


def test_a_push_that_broke_off_can_be_repeated(
    export: Path, hub: WritableHub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["push", str(export), "--repo-id", "ada/pages"]
    weights, tokenizer = (
        sha256((export / name).read_bytes()).decode() for name in ("model.safetensors", "tokenizer.json")
    )
    hub.refused = {weights}
    assert main(words) == 2
    message = error_of(capsys)
    assert "was not pushed to ada/pages (" in message and "403" in message and "the same command goes on" in message
    assert TOKEN not in message
    assert not hub.repositories["ada/pages"].branches["main"]
    hub.refused, hub.refuses_commits = set(), True
    assert main(words) == 2
    assert "403" in error_of(capsys)
    hub.refuses_commits = False
    assert main(words) == 0
    assert hub.repositories["ada/pages"].branches["main"] == contents(export)
    # What has arrived is not sent again.
    sent = hub.arrived("PUT")
    assert sent.count(f"/lfs/{tokenizer}") == 1 and sent.count(f"/lfs/{weights}") == 2  # once refused
    assert main(words) == 0
    assert len(hub.arrived("PUT")) == len(sent)


def test_a_branch_and_a_pull_request(export: Path, hub: WritableHub, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["push", str(export), "--repo-id", "ada/pages"]
    assert main([*words, "--revision", "trial/2"]) == 0
    repository = hub.repositories["ada/pages"]
    assert repository.branches == {"main": {}, "trial/2": contents(export)}
    assert main([*words, "--create-pr"]) == 0
    assert capsys.readouterr().out.endswith(f"{hub.url}/ada/pages/discussions/1\n")
    assert (repository.branches["main"], repository.pull_requests) == ({}, [contents(export)])
    assert main([*words, "--create-pr", "--revision", "trial"]) == 2
    assert "--create-pr asks for a change of the main branch" in error_of(capsys)


def test_weights_of_a_push_before_go_and_what_a_person_added_stays(export: Path, hub: WritableHub) -> None:
    there = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}", "LICENSE": b"words"}
    hub.repositories["ada/pages"] = Repository(branches={"main": dict(there)})
    assert main(["push", str(export), "--repo-id", "ada/pages"]) == 0
    assert hub.repositories["ada/pages"].branches["main"] == {**contents(export), "LICENSE": b"words"}


def test_a_dry_run_asks_nobody(
    export: Path, hub: WritableHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN")
    before = contents(export)
    assert main(["push", str(export), "--repo-id", "ada/pages", "--dry-run"]) == 0
    told = capsys.readouterr().out
    sizes = files_of(export)
    assert all(name in told for name in sizes)
    assert f"{len(sizes)} files, " in told and told.endswith("to ada/pages\nnothing was sent\n")
    assert (hub.requests, contents(export)) == ([], before)


def test_what_is_refused_before_anything_is_sent(
    export: Path, hub: WritableHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    words = ["push", str(export), "--repo-id", "ada/pages"]

    def refused(message: str, *, words: list[str] = words) -> None:
        assert main(words) == 2
        told = error_of(capsys)
        assert message in told, told

    refused("pages is no name on the hub; write NAME/REPO", words=[*words[:2], "--repo-id", "pages"])
    refused("is no name on the hub (Cannot have -- or .. in repo_id", words=[*words[:2], "--repo-id", "ada/pa--ges"])
    refused("is no name on the hub; write NAME/REPO", words=[*words[:2], "--repo-id", "\u00e4da/pages"])
    for branch in ("", "a b", "a..b"):
        refused("cannot be the name of a branch", words=[*words, f"--revision={branch}"])
    refused("there is no folder", words=["push", str(export / "missing"), *words[2:]])
    refused("is no export of farnear", words=["push", str(export / "1_Pooling"), *words[2:]])
    card = (export / CARD).read_text()
    for license_line in ("license: unknown", "license:", "language: en"):
        (export / CARD).write_text(card.replace("license: apache-2.0", license_line))
        refused("names no licence")
    (export / CARD).write_text("---\nlicense: [\n---\n")
    refused("cannot be read (")
    (export / CARD).write_text(card)
    for stray in (".env", "1_Pooling/notes.txt", "checkpoints/step-1/x"):
        (export / stray).parent.mkdir(parents=True, exist_ok=True)
        (export / stray).write_text("secret")
        refused(f"holds {stray}, which is not of the export; move it out")
        (export / stray).unlink()
    whole = (export / "tokenizer.json").read_bytes()
    (export / "tokenizer.json").write_bytes(whole[:-1])
    refused(f"is not whole: tokenizer.json has {len(whole) - 1:,} bytes, not {len(whole):,}")
    (export / "tokenizer.json").unlink()
    refused("is not whole: tokenizer.json is missing")
    (export / "tokenizer.json").write_bytes(whole)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(export / "no-token"))
    refused("there is no token for the hub; run `hf auth login`, or set HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set")
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.repositories["ada/pages"] = Repository()
    refused("ada/pages is public already", words=[*words, "--private"])
    assert (export / CARD).read_text() == card
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    refused("was not pushed to ada/pages (")
    assert hub.repositories["ada/pages"].commits == 0


def test_a_run_folder_stands_for_its_export(export: Path, hub: WritableHub, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("output_dir: x\n")
    assert main(["push", str(tmp_path), "--repo-id", "ada/pages"]) == 0
    assert hub.repositories["ada/pages"].branches["main"] == contents(export)
