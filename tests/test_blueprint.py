"""A model's files are anybody's: what is odd in them is one line that names the file, and never a traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import make_inputs, run_tree

from farnear.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("blueprint"))
    (folder / "run.yaml").write_text(yaml.safe_dump(run_tree(folder, "run")))
    return folder


CONFIG, PROCESSOR, DENSE = "config.json", "preprocessor_config.json", "2_Dense/config.json"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        (CONFIG, "[]", "holds [], not an object"),
        (CONFIG, "5", "holds 5, not an object"),
        (CONFIG, "{", "cannot be read"),
        (CONFIG, {"text_config": []}, "text_config is [], not an object"),
        (CONFIG, {"text_config": "x"}, 'text_config is "x", not an object'),
        (CONFIG, {"text_config": {}}, "tells no hidden_size"),
        (CONFIG, {"text_config": {"hidden_size": "a"}}, 'hidden_size is "a", not a whole number of 1 or more'),
        (CONFIG, {"vision_config": []}, "vision_config is [], not an object"),
        (CONFIG, {"vision_config": {"patch_size": 0}}, "vision_config: patch_size is 0, not a whole number of 1"),
        (CONFIG, {"vision_config": {"spatial_merge_size": -1}}, "spatial_merge_size is -1, not a whole number of 1"),
        (PROCESSOR, "[]", "holds [], not an object"),
        (PROCESSOR, "x", "cannot be read"),
        (PROCESSOR, {"size": 5}, "size is 5, not an object"),
        (PROCESSOR, {"patch_size": "a"}, 'patch_size is "a", not a whole number of 1 or more'),
        (PROCESSOR, {"patch_size": 0}, "patch_size is 0, not a whole number of 1 or more"),
        (PROCESSOR, {"min_pixels": "a"}, 'min_pixels is "a", not a whole number of 0 or more'),
        (DENSE, "{}", "tells no out_features"),
        (DENSE, "x", "cannot be read"),
        (DENSE, {"out_features": "a"}, 'out_features is "a", not a whole number of 1 or more'),
    ],
)
def test_an_odd_file_of_a_model(
    name: str,
    content: str | dict[str, Any],
    what: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file in (CONFIG, PROCESSOR):
        if (folder / "base" / file).exists():
            (tmp_path / file).write_bytes((folder / "base" / file).read_bytes())
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, dict):
        of_model = json.loads(path.read_text()) if path.exists() else {}
        content = json.dumps({**of_model, **content})
    path.write_text(content)
    capsys.readouterr()
    assert main(["plan", str(folder / "run.yaml"), f"model.name_or_path={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"farnear: error: {path}") and error.count("\n") == 1, error
    assert what in error
    assert "; copy the model's own" in error
