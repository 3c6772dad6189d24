"""The run file: what is refused and how the refusal reads, overrides, and the resolved copy."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteRunFile

from farnear import config as config_module
from farnear.config import FOREIGN_KEYS, RunConfig, dump_config, known_keys, load_config, models_named, parse_config
from farnear.errors import UserError
from farnear.sections import TrainingConfig

SECTIONS = {"model", "data", "loss", "training", "evaluation", "reranker", "mining", "slurm", "card"}


def _refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("training.learning_rat=1e-5", "training.learning_rate"),
        ("training.warmup_step=3", "training.warmup_steps"),
        ("learning_rate=1e-5", "training.learning_rate"),  # right name, wrong place
        ("training.seed=1", "seed"),
        ("model.maxpixels=100", "model.max_pixels"),
        ("model.name=x", "model.name_or_path"),
        ("model.router.imgae=x", "model.router.image"),
        ("data.training=[x]", "data.train"),
        ("evaluation.metric=x", "evaluation.metric_for_best_model"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_one(
    write_run_file: WriteRunFile, override: str, nearest: str
) -> None:
    message = _refusal(write_run_file(), override)
    assert f"unknown key '{override.partition('=')[0]}'; did you mean '{nearest}'?" in message


def test_every_unknown_key_of_a_file_is_named_at_once(write_run_file: WriteRunFile) -> None:
    message = _refusal(write_run_file(strategi="ddp", training={"bf_16": True}))
    assert "did you mean 'strategy'?" in message
    assert "did you mean 'training.bf16'?" in message
    assert "run.yaml" in message


@pytest.mark.parametrize("section", ["", "training."])
@pytest.mark.parametrize("key", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_batch_keys_of_other_trainers_are_answered_with_the_conversion(
    write_run_file: WriteRunFile, section: str, key: str
) -> None:
    message = _refusal(write_run_file(), f"{section}{key}=4")
    assert (
        "training.global_batch_size" in message
        and "per_device_train_batch_size x gradient_accumulation_steps x num_processes" in message
        and "training.mini_batch_size" in message
    )


def test_advice_for_foreign_keys_names_known_keys_only() -> None:
    known = set(known_keys())
    assert not {key.rpartition(".")[2] for key in known} & set(FOREIGN_KEYS)
    for advice in FOREIGN_KEYS.values():
        named = {word.strip(":;,") for word in advice.split() if "." in word.strip(".:;,")}
        assert named <= known, named - known


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learning_rate=-1", ["training.learning_rate", "greater than 0", "-1"]),
        ("training.global_batch_size=many", ["training.global_batch_size", "integer", "'many'"]),
        ("training.global_batch_size=1", ["training.global_batch_size", "greater than or equal to 2"]),
        ("training.max_steps=0", ["training", "max_steps", "-1"]),
        ("training.lr_scheduler_type=exponential", ["lr_scheduler_type", "'linear'", "'cosine'", "'exponential'"]),
        ("strategy=fsdp", ["strategy", "'zero2'", "'fsdp'"]),
        ("data.train=[]", ["no training shards are named; set data.train, or data.sources"]),
        ("data.sources={a: {train: x.tar}}", ["data.train and data.sources both name"]),
        ("data={sources: {a: {train: x.tar, wieght: 2}}}", ["data.sources.a.wieght", "train, corpus, weight"]),
        ("data={sources: {a: {train: []}}}", ["data.sources.a.train: list", "at least 1"]),
        (
            "data={sources: {a: {train: x, weight: 1}, b: {train: y}}}",
            ["some sources have a weight and some have none"],
        ),
        ("data.tail=fill", ["data.tail", "'carry'", "'fill'"]),
        ("data.max_bad_fraction=2", ["data.max_bad_fraction", "less than or equal to 1"]),
        ("loss.matryoshka_dims=64", ["loss.matryoshka_dims", "should be a list", "64"]),
        ("loss.temperature=0.05", ["loss.temperature is not a key", "loss.scale", "1 / temperature"]),
        ("trainin.max_steps=3", ["unknown key 'trainin'; did you mean 'training'?"]),
        ("loss.matryoshka_weights=[1]", ["matryoshka_weights needs matryoshka_dims"]),
        ("training={bf16: true, pure_bf16: true}", ["bf16", "pure_bf16", "set one"]),
        ("training={bf16: true, fp16: true}", ["fp16 and bf16", "set one"]),
        ("training.load_best_model_at_end=true", ["load_best_model_at_end", "data.eval", "evaluation.eval_steps"]),
        ("evaluation.eval_steps=10", ["evaluation.eval_steps", "data.eval"]),
        ("model=null", ["'model.name_or_path' is missing"]),
        ("model=3", ["model: input should be a section"]),
        ("training.learning_rate=.inf", ["training.learning_rate", "finite"]),
        ("training.num_train_epochs=.nan", ["training.num_train_epochs", "finite"]),
        ("training.learning_rate=true", ["training.learning_rate", "a number, not true"]),
        ("num_processes=false", ["num_processes", "a number, not false"]),
        ("training.global_batch_size=100000000000000", ["training.global_batch_size", "1048576"]),
        ("loss={matryoshka_dims: [64, 32], matryoshka_weights: [1, 0]}", ["matryoshka_weights must be positive"]),
        ("model={name_or_path: x, min_pixels: 9, max_pixels: 4}", ["min_pixels 9 is above max_pixels 4"]),
        ("model.name_or_path=", ["'model.name_or_path' is missing", "model.router"]),
        ("model.router={text: a, image: b}", ["name_or_path and router are both given", "take one of them out"]),
        ("model={router: {text: a}}", ["model.router: it has text", "two models or more"]),
        ("model={router: {text: a, query: b}}", ["model.router: it has text, query", "by their side"]),
        ("model={router: {text: a, image: {name: b}}}", ["'model.router.image.name'", "'model.router.image.name_or"]),
        (
            "model={router: {text: a, image: b}, revision: c}",
            ["revision goes with name_or_path", "router.text.revision"],
        ),
        ("model={router: {text: a, image: b}, lora: {r: 2}}", ["lora adapts one model", "take it out"]),
        ("foo=1", ["unknown key 'foo'; the keys there are output_dir, strategy"]),
        ("data.train={a: 1, a: 2}", ["the key 'a' stands twice"]),
        ("training.max_steps", ["'training.max_steps' is not an override", "section.key=value"]),
        ("=3", ["is not an override"]),
        ("model.name_or_path.x=3", ["'name_or_path' is a value, not a section"]),
        ("data.train=[a", ["override data.train", "not YAML"]),
    ],
)
def test_a_wrong_value_is_refused_by_name(write_run_file: WriteRunFile, override: str, words: list[str]) -> None:
    message = _refusal(write_run_file(), override)
    assert [word for word in words if word not in message] == [], message


def test_what_yaml_would_take_for_something_else(write_run_file: WriteRunFile) -> None:
    path = write_run_file(output_dir="runs")
    text = path.read_text()
    path.write_text(text + "training:\n  max_steps: 3\ntraining:\n  bf16: true\n")
    assert "the key 'training' stands twice" in _refusal(path)
    path.write_text(text + "training:\n")
    assert load_config(path).training == TrainingConfig()
    assert load_config(path, ["output_dir=2024-02-30"]).output_dir == "2024-02-30"
    path.write_text(text + "seed: " + 5000 * "1")
    assert "is not YAML" in _refusal(path)


def test_combinations_that_cannot_train_are_refused(write_run_file: WriteRunFile) -> None:
    assert "one process" in _refusal(write_run_file(strategy="single", num_processes=2))
    assert "training.bf16" in _refusal(write_run_file(strategy="zero2", training={"pure_bf16": True}))
    assert "training.bf16" in _refusal(write_run_file(strategy="fsdp2", training={"pure_bf16": True}))
    assert "shard_within: node is for strategy fsdp2, not zero3" in _refusal(
        write_run_file(strategy="zero3", shard_within="node")
    )
    for strategy in ("single", "ddp", "zero1"):
        message = _refusal(write_run_file(strategy=strategy, training={"reduce": "mini_batch"}))
        assert f"under {strategy} they are whole on every rank" in message
    assert "reshard: step is for zero3 and fsdp2" in _refusal(
        write_run_file(strategy="zero2", training={"reshard": "step"})
    )
    router = {"router": {"text": "a", "image": "b"}}
    assert "a reranker reads query and page in one model" in _refusal(write_run_file(model=router, reranker={}))
    dims = {"matryoshka_dims": [64, 32], "matryoshka_weights": [1]}
    assert "1 values for 2" in _refusal(write_run_file(loss=dims))
    assert "twice" in _refusal(write_run_file(loss={"matryoshka_dims": [64, 64]}))


def test_what_is_missing_is_named(write_run_file: WriteRunFile) -> None:
    message = _refusal(write_run_file(model={}, data={}))
    assert "'model.name_or_path' is missing" in message
    assert "no training shards are named" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "holds no keys"), ("- a\n", "holds no keys"), ("a: [", "is not YAML"), ("\0", "is not YAML")],
)
def test_a_file_that_is_no_run_file_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert words in _refusal(path)
    assert "cannot be read" in _refusal(tmp_path / "missing.yaml")


def test_overrides_have_the_type_of_their_key(write_run_file: WriteRunFile) -> None:
    config = load_config(
        write_run_file(training=None),
        [
            "training.learning_rate=1e-5",  # YAML 1.1 reads this as a string
            "training.max_steps=7",
            "training.bf16=true",
            "loss.matryoshka_dims=[64, 32]",
            "model.model_kwargs.attn.kind=eager",
            "model.freeze=visual",
            "model.lora.r=8",
            "model.prompts={query: 'Query: '}",
            "num_processes=null",
            "output_dir=runs/a=b",
            "training.max_steps=8",  # the last one wins
        ],
    )
    assert config.training.learning_rate == 1e-5
    assert config.training.max_steps == 8
    assert config.training.bf16 is True
    assert config.loss.matryoshka_dims == (64, 32)
    assert config.model.model_kwargs == {"attn": {"kind": "eager"}}
    assert config.model.freeze == ("visual",)
    assert config.model.lora == {"r": 8}
    assert config.model.prompts == {"query": "Query: "}
    assert config.num_processes is None
    assert config.output_dir == "runs/a=b"


@pytest.mark.parametrize(
    ("value", "expected"), [("none", ()), ("wandb", ("wandb",)), ("[wandb, mlflow]", ("wandb", "mlflow"))]
)
def test_report_to_takes_one_tracker_several_or_none(
    write_run_file: WriteRunFile, value: str, expected: tuple[str, ...]
) -> None:
    assert load_config(write_run_file(), [f"training.report_to={value}"]).training.report_to == expected


def test_the_resolved_file_loads_to_the_same_config(write_run_file: WriteRunFile, tmp_path: Path) -> None:
    config = load_config(
        write_run_file(model={"name_or_path": "m", "prompts": {"query": "é: \n"}}),
        ["loss.matryoshka_dims=[64,32]", "loss.matryoshka_weights=[1,0.3]", "training.warmup_steps=0.1"],
    )
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(config), encoding="utf-8")
    assert load_config(resolved) == config
    reranker = load_config(write_run_file(reranker={"head": "linear"}))
    resolved.write_text(dump_config(reranker), encoding="utf-8")
    assert load_config(resolved) == reranker
    # A model is one or joined, so no run file has all keys.
    known = {key for key in known_keys() if not key.startswith("model.router.")}
    assert known == set(_dotted(reranker.model_dump())) | SECTIONS
    router = {"text": "m", "image": {"name_or_path": "n", "revision": "r"}}
    joined = load_config(write_run_file(model={"router": router}))
    resolved.write_text(dump_config(joined), encoding="utf-8")
    assert load_config(resolved) == joined
    assert [(one.name_or_path, one.revision) for one in models_named(joined)] == [("m", None), ("n", "r")]
    assert list(joined.model.by_key) == ["model.router.text", "model.router.image"]


def test_a_config_cannot_be_changed_by_accident() -> None:
    config = parse_config({"output_dir": "x", "model": {"name_or_path": "m"}, "data": {"train": ["a"]}})
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_every_key_is_documented_by_one_line() -> None:
    classes = [node for node in ast.parse(inspect.getsource(config_module)).body if isinstance(node, ast.ClassDef)]
    for section in classes:
        for field in (node.target for node in section.body if isinstance(node, ast.AnnAssign)):
            assert isinstance(field, ast.Name)
            model_field = getattr(config_module, section.name).model_fields[field.id]
            # A section is documented by its own class.
            description = model_field.description or getattr(model_field.annotation, "__doc__", None)
            assert description, f"{section.name}.{field.id}"
            assert "\n" not in description
            assert description.endswith("."), f"{section.name}.{field.id}"
    assert "RunConfig" in [section.name for section in classes]
    assert RunConfig.model_fields["strategy"].description


def _dotted(tree: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        is_section = prefix == "" and isinstance(value, dict)
        keys += _dotted(value, f"{key}.") if is_section else [prefix + key]
    return keys
