"""The run file: one YAML that decides everything about a training.

A run file has five sections (`model`, `data`, `loss`, `training`, `evaluation`), a few keys of its own, and sections
for those who need them: `reranker`, with which a cross-encoder is trained, `mining` for hard negatives, `slurm` for a
cluster, and `card` for the README of an export. Three ways lead to a ``RunConfig``, all with the same validation:

    load_config("run.yaml", ["training.learning_rate=1e-5"])     what the commands do
    RunConfig.model_validate({...})                              from Python
    load_config("runs/x/run.yaml")                               the resolved copy that a run leaves: the same config

The keys of the sections are in `farnear.sections`, `farnear.reranker_section`, `farnear.mining_section`,
`farnear.slurm_section` and `farnear.card_section`. An unknown key is an error that proposes the nearest known one,
wherever it lives; names that mean something else here (`per_device_train_batch_size`) are answered with the
conversion.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from farnear.card_section import CardConfig
from farnear.errors import UserError
from farnear.mining_section import MiningConfig
from farnear.reranker_section import RerankerConfig
from farnear.sections import (
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    Section,
    SourceConfig,
    Strategy,
    TrainingConfig,
)
from farnear.slurm_section import SlurmConfig
from farnear.yaml_text import read_yaml

# What users of other trainers write, and what to write here instead.
FOREIGN_KEYS = {
    "per_device_train_batch_size": (
        "training.global_batch_size counts the pairs of all ranks together: set it to per_device_train_batch_size x "
        "gradient_accumulation_steps x num_processes, and training.mini_batch_size to what fits through the model at "
        "once"
    ),
    "gradient_accumulation_steps": (
        "negatives come from the whole batch, so nothing is accumulated: set training.global_batch_size to "
        "per_device_train_batch_size x gradient_accumulation_steps x num_processes, and training.mini_batch_size to "
        "what fits through the model at once"
    ),
    "torch_dtype": "weights always train in fp32; training.bf16 sets the compute, training.pure_bf16 the weights too",
    "temperature": "loss.scale is its inverse: set loss.scale to 1 / temperature",
    "batch_size": (
        "training.global_batch_size counts the pairs of all ranks together, training.mini_batch_size sets what fits "
        "through the model at once"
    ),
    "train_batch_size": "training.global_batch_size counts the pairs of all ranks together",
    "lr": "write training.learning_rate",
    "gpus": "slurm.gpus_per_node counts the GPUs of each node, and submit's --nodes the nodes",
    "resume_from_checkpoint": "say --resume to continue, or --resume auto to continue if there is a checkpoint",
    "save_strategy": "training.save_steps is a number of steps, or below 1 a share of all",
    "eval_strategy": "evaluation.eval_steps is a number of steps, or below 1 a share of all",
    "save_safetensors": "weights are never written in another format",
    "save_only_model": "export/ holds the model alone; a checkpoint holds what it takes to continue",
    "greater_is_better": "it is, for every measure of evaluation.metric_for_best_model",
    "max_length": "pages are bounded by model.max_pixels, queries by the tokenizer's own limit",
}


class RunConfig(Section):
    """One training run."""

    output_dir: str
    """The run folder: everything about the run is in it."""
    strategy: Strategy = "ddp"
    """single (one process, no launcher), ddp, DeepSpeed ZeRO stage 1, 2, 3, or torch's fsdp2."""
    shard_within: Literal["world", "node"] = "world"
    """fsdp2: the ranks over which one copy of the model is spread. node: each machine holds a copy of its own."""
    num_processes: int | None = Field(default=None, ge=1)
    """Ranks the run must have. Unset: as many as the launcher started."""
    seed: int = Field(default=42, ge=0)
    """Decides the order of the pairs and every dropout mask."""
    model: ModelConfig
    data: DataConfig
    loss: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    reranker: RerankerConfig | None = None
    """Trains a cross-encoder by this section; unset: an embedder by `loss`."""
    mining: MiningConfig = MiningConfig()
    slurm: SlurmConfig = SlurmConfig()
    card: CardConfig = CardConfig()

    @field_validator("model", "data", "loss", "training", "evaluation", "mining", "slurm", "card", mode="before")
    @classmethod
    def _all_lines_commented_out(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("loss", mode="before")
    @classmethod
    def _a_function_alone(cls, value: Any) -> Any:
        return {"function": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _combinations(self) -> "RunConfig":
        own = Path(self.output_dir).absolute()
        for path in self.data.exclude:
            if Path(path).absolute().is_relative_to(own):
                raise ValueError(
                    f"data.exclude: {path} lies in output_dir, where the run writes such files anew; copy it "
                    "elsewhere, or set another output_dir"
                )
        if self.strategy == "single" and self.num_processes not in (None, 1):
            raise ValueError(f"strategy single is one process, but num_processes is {self.num_processes}; use ddp")
        if self.shard_within == "node" and self.strategy != "fsdp2":
            raise ValueError(
                f"shard_within: node is for strategy fsdp2, not {self.strategy}; take it out, or use fsdp2"
            )
        if self.training.reduce == "mini_batch" and self.strategy not in ("zero2", "zero3", "fsdp2"):
            raise ValueError(
                f"training.reduce: mini_batch saves memory where gradients are partitioned; under {self.strategy} they "
                "are whole on every rank, so it would only cost time: take it out, or use zero2, zero3 or fsdp2"
            )
        if self.training.reshard == "step" and self.strategy not in ("zero3", "fsdp2"):
            raise ValueError(
                f"training.reshard: step is for zero3 and fsdp2, which gather parameters; {self.strategy} has them "
                "whole on every rank: take it out"
            )
        if self.training.pure_bf16 and self.strategy not in ("single", "ddp"):
            raise ValueError(
                "training.pure_bf16 works under single and ddp; ZeRO and FSDP2 keep fp32 weights: use training.bf16"
            )
        if self.training.optim == "adamw_8bit" and self.strategy not in ("single", "ddp"):
            raise ValueError(
                f"training.optim: adamw_8bit works under single and ddp; {self.strategy} cuts the moments across its "
                "8-bit blocks, so a checkpoint could not hold them: set adamw_torch, whose moments it spreads anyway"
            )
        if self.training.load_best_model_at_end and (not self.data.eval or self.evaluation.eval_steps is None):
            raise ValueError("training.load_best_model_at_end needs data.eval and evaluation.eval_steps")
        if self.evaluation.eval_steps is not None and not self.data.eval:
            raise ValueError("evaluation.eval_steps is set, but data.eval names no shards")
        if self.evaluation.embedder is not None and not self.data.eval:
            raise ValueError("evaluation.embedder is set, but data.eval names no shards")
        return self

    @model_validator(mode="after")
    def _refresh_has_a_use(self) -> "RunConfig":
        if self.mining.refresh_every is None:
            return self
        if self.reranker is not None:
            raise ValueError(
                "mining.refresh_every has an embedder mine with its own weights, which a reranker cannot; take it out, "
                "and mine for it with `farnear mine`"
            )
        if self.loss.distillation is not None and self.mining.reranker is None:
            raise ValueError(
                "loss.distillation learns from a teacher's scores, which what mining.refresh_every finds has none of "
                "without mining.reranker; name one, or take one of the two out"
            )
        if self.data.num_negatives == 0:
            raise ValueError(
                "mining.refresh_every mines hard negatives, and data.num_negatives: 0 has none of them used; take one "
                "of the two out"
            )
        return self

    @property
    def negatives_of_refresh(self) -> int:
        """Most hard negatives of a pair once the run has mined again; 0 where it never does."""
        if self.mining.refresh_every is None:
            return 0
        most = self.data.num_negatives
        return self.mining.num_negatives if most is None else min(most, self.mining.num_negatives)

    @model_validator(mode="after")
    def _one_kind(self) -> "RunConfig":
        training = self.training
        asked = {side for value in (training.mini_batch_size, training.mini_batch_num_tokens) for side in _keys(value)}
        if self.reranker is None:
            for name in ("embedder", "rerank_k"):
                if getattr(self.evaluation, name) != EvaluationConfig.model_fields[name].default:
                    raise ValueError(f"evaluation.{name} is for a reranker, and there is no section reranker")
            if "pair" in asked:
                raise ValueError("mini-batches of pairs are a reranker's, and there is no section reranker")
            return self
        if self.model.router is not None:
            raise ValueError("a reranker reads query and page in one model; set model.name_or_path, not model.router")
        if self.loss != LossConfig():
            raise ValueError(
                "section loss is an embedder's; a reranker's loss stands in section reranker: take one out"
            )
        if "query" in asked:
            raise ValueError("a reranker's mini-batches are of pairs and of pages (document), not of queries")
        if "auto" in (training.keep_graphs, *training.mini_batch_num_tokens_of.values()):
            raise ValueError(
                "auto is not for rerankers yet: set training.mini_batch_num_tokens and keep_graphs in numbers"
            )
        return self


def _keys(of_sides: Any) -> Iterator[str]:
    yield from of_sides if isinstance(of_sides, dict) else ()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file and apply dotted overrides.

    Args:
        path: A YAML file.
        overrides: `section.key=value` words; the value is read as YAML, so `[1, 2]`, `null` and `true` work.

    Raises:
        UserError: The file cannot be read, a key is unknown, or a value is out of range.
    """
    tree = read_tree(Path(path))
    if "stages" in tree:
        raise UserError(
            f"{path} has stages, which `farnear launch` runs one after the other; it writes a run file of each into "
            "its output_dir: name one of these"
        )
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, source=str(path))


def read_tree(path: Path) -> dict[str, Any]:
    """The plain values of a run file, or of a flywheel file.

    Raises:
        UserError: It cannot be read, or holds no keys.
    """
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"run file {path} cannot be read ({error.strerror}); name an existing YAML file") from None
    except ValueError as error:
        raise UserError(f"run file {path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"run file {path} holds no keys; it needs at least output_dir, model and data")
    return tree


def parse_config(tree: dict[str, Any], source: str = "the run's configuration") -> RunConfig:
    """Validate a tree of plain values.

    Raises:
        UserError: Naming every wrong key and value, and where they came from.
    """
    unknown = list(_unknown_keys(tree, RunConfig))
    if unknown:
        raise UserError(f"{source}: " + "; ".join(_advice(key) for key in unknown))
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_complaint(detail) for detail in error.errors())) from None


def dump_config(config: RunConfig) -> str:
    """The resolved run file as YAML text; `load_config` of it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def model_beside(config: RunConfig, name: str) -> ModelConfig:
    """What is loaded of another model that the run file names in a word; all else is as its own folder has it."""
    model = config.model
    return ModelConfig(
        name_or_path=name,
        attn_implementation=model.attn_implementation,
        allow_kernel_download=model.allow_kernel_download,
        trust_remote_code=model.trust_remote_code,
    )


def models_named(config: RunConfig) -> list[ModelConfig]:
    """The model that is trained, and those that are asked beside it."""
    names = (config.evaluation.embedder, config.mining.reranker)
    return [*config.model.by_key.values(), *(model_beside(config, name) for name in names if name is not None)]


def known_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the run file, sections included."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if part := _section_of(field):
            yield from known_keys(part, f"{prefix}{name}.")


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set a dotted key to a value, which is read as YAML. Raises UserError where it is not that."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"'{override}' is not an override; write section.key=value, such as training.max_steps=100")
    try:
        value = read_yaml(text)
    except ValueError as error:
        raise UserError(f"override {key}: the value is not YAML: {error}") from None
    *sections, leaf = key.split(".")
    for section in sections:
        # An empty section, all of whose lines are commented out, is None.
        tree[section] = tree.get(section) or {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UserError(f"override {key}: '{section}' is a value, not a section; {_advice(key)}")
    tree[leaf] = value


def _unknown_keys(tree: dict[str, Any], section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        field = section.model_fields.get(str(key))
        if field is None:
            yield f"{prefix}{key}"
        elif isinstance(value, dict) and (part := _section_of(field)):
            yield from _unknown_keys(value, part, f"{prefix}{key}.")


def _section_of(field: FieldInfo) -> type[Section] | None:
    kinds = get_args(field.annotation) if NoneType in get_args(field.annotation) else (field.annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _advice(key: str) -> str:
    leaf = key.rsplit(".", 1)[-1]
    if leaf in FOREIGN_KEYS:
        return f"{key} is not a key of farnear: {FOREIGN_KEYS[leaf]}"
    # Of equals the one in the same section.
    nearest = max(
        known_keys(), key=lambda known: (_likeness(key, known), known.rpartition(".")[0] == key.rpartition(".")[0])
    )
    if _likeness(key, nearest) < 0.5:
        section = key.rpartition(".")[0]
        there = [known.rpartition(".")[2] for known in known_keys() if known.rpartition(".")[0] == section]
        return f"unknown key '{key}'; the keys there are {', '.join(there) or 'none: it is no section'}"
    return f"unknown key '{key}'; did you mean '{nearest}'?"


def _likeness(key: str, known: str) -> float:
    """How probably a key that does not exist means a known one, by the last word of each, and by the section."""
    (section, _, leaf), (known_section, _, known_leaf) = key.rpartition("."), known.rpartition(".")
    likeness = difflib.SequenceMatcher(None, leaf, known_leaf).ratio() + 0.3 * (
        leaf in known_leaf or known_leaf in leaf
    )
    likeness += 0.2 * (section != "" and section == known_section)
    # The sections at the top do not lie in sections.
    known_is_section = "." not in known and any(other.startswith(f"{known}.") for other in known_keys())
    return likeness - ("." in key and known_is_section)


def _complaint(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    what = detail["msg"].removeprefix("Value error, ").replace("valid tuple", "list").replace("Tuple", "List")
    if detail["type"] == "model_type":
        what = "input should be a section with keys of its own"
    if detail["type"] == "extra_forbidden":
        # Inside of data.sources, whose keys are the user's own.
        return f"{where} is not a key of a source; the keys there are {', '.join(SourceConfig.model_fields)}"
    if detail["type"] == "missing":
        return f"'{where}' is missing and has no default; set it"
    if detail["type"] == "value_error":
        return f"{where}: {what}" if where else what
    return f"{where}: {what[0].lower()}{what[1:]}, not {detail['input']!r}"
