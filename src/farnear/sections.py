"""The sections of a run file: `model`, `data`, `loss`, `training`, `evaluation`.

The models are frozen and know no extra keys. Names that users of sentence-transformers and transformers know keep the
meaning they have there. The line of text under each field is its documentation; what only makes sense together is
checked here too, and `farnear.config` turns what is wrong into one line for the user.
"""

import math
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationInfo, field_validator, model_validator

Side = Literal["query", "document", "pair"]
NumTokens = PositiveInt | Literal["auto"]
Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "varlen"]


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation is made of."""
    parts = get_args(annotation)
    return set().union(*map(_kinds, parts)) if parts else {annotation}


class Section(BaseModel):
    """A part of the run file: frozen, without unknown keys, documented by the line under each field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take true for 1, a learning rate of 1.0 for instance."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError(f"a number, not {str(value).lower()}")
        return value


# Keys of the loss section that say which places of the score matrix InfoNCE takes, and how.
_OF_SOFTMAX = ("directions", "partition_mode", "hardness_mode", "margin", "margin_strategy")
# Those that a user's own function does not read; it gets what it needs from its own code.
_OF_INFONCE = ("scale", "learn_scale", "max_scale", *_OF_SOFTMAX)


def interval(steps: float | None) -> Any:
    """Steps as they are, if they can be an interval: a whole number, or below 1 a share of all."""
    if steps is not None and steps > 1 and steps != int(steps):
        raise ValueError(f"a whole number of steps, or below 1 a share of all, not {steps:g}")
    return steps


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, (int, kind)) and not isinstance(value, bool)


def _of_sides(value: Any) -> dict[str, Any]:
    """One value stands for both sides; a side that is not named has none."""
    return {side: value.get(side) if isinstance(value, dict) else value for side in ("document", "query", "pair")}


def _patterns(value: Any) -> Any:
    """One pattern stands for a list of it, an empty one for none."""
    return tuple(filter(None, [value])) if value is None or isinstance(value, str) else value


class TowerConfig(Section):
    """One of the models that `model.router` joins; its name alone will do."""

    name_or_path: str = Field(min_length=1)
    """A SentenceTransformer, or a model of transformers: a hub name or a folder."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name_or_path": value} if isinstance(value, str) else value


class RouterConfig(Section):
    """Models to join: by what each reads (text, image, ...), or by the side that it embeds (query, document)."""

    text: TowerConfig | None = None
    """Reads texts."""
    image: TowerConfig | None = None
    """Reads pages; the others are projected to the width of its embeddings."""
    audio: TowerConfig | None = None
    """Reads audio."""
    video: TowerConfig | None = None
    """Reads videos."""
    query: TowerConfig | None = None
    """Embeds queries, whatever they are."""
    document: TowerConfig | None = None
    """Embeds documents; the queries' model is projected to the width of its embeddings."""

    @property
    def by_route(self) -> dict[str, TowerConfig]:
        """Those that are named."""
        return {name: tower for name in type(self).model_fields if (tower := getattr(self, name)) is not None}

    @model_validator(mode="after")
    def _one_way_to_route(self) -> "RouterConfig":
        names = list(self.by_route)
        by_side = {"query", "document"} & set(names)
        if len(names) < 2 or (by_side and len(by_side) < len(names)):
            raise ValueError(
                f"it has {', '.join(names) or 'no model'}, and joins two models or more by what they read (text, "
                "image, audio, video), or two by their side (query, document); name them so"
            )
        return self


class ModelConfig(Section):
    """Which model is trained and how it reads its inputs."""

    name_or_path: str = ""
    """A SentenceTransformer that reads pages, a vision-language model, CLIP or SigLIP: a hub name or a folder."""
    router: RouterConfig | None = None
    """In place of name_or_path: models to join, {text: NAME, image: NAME} or {query: NAME, document: NAME}."""
    revision: str | None = None
    """Commit, tag or branch on the hub. Pin a commit for runs that must be repeatable."""
    trust_remote_code: bool = False
    """Whether code from the model's repository may run. Leave off unless you have read it."""
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the model's from_pretrained, as in SentenceTransformer(model_kwargs=...)."""
    processor_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the processor's from_pretrained, as in SentenceTransformer(processor_kwargs=...)."""
    attn_implementation: Attention | None = None
    """eager, sdpa, flash_attention_2 or _3, flex_attention, or varlen, which packs; unset leaves it to transformers."""
    allow_kernel_download: bool = False
    """Whether transformers may download compiled kernels from the hub and run them where a package is missing."""
    freeze: tuple[str, ...] = ()
    """Modules that are not trained, as shell-style patterns on their names: visual, language_model.layers.[0-7]."""
    lora: dict[str, Any] | None = None
    """Trains adapters beside a frozen model: keys of peft.LoraConfig. No target_modules: all of the language model."""
    min_pixels: int | None = Field(default=None, ge=1)
    """Smallest page in pixels (width x height); smaller ones are enlarged by the processor."""
    max_pixels: int | None = Field(default=None, ge=1)
    """Largest page in pixels (width x height); larger ones are reduced. It sets the tokens a page costs."""
    pooling: Literal["lasttoken", "mean"] | None = None
    """Pooling added to a model that has none; unset means lasttoken. A model with its own pooling keeps it."""
    normalize: bool = True
    """Whether a normalisation layer is added to a model that has none, and to what is joined."""
    prompts: dict[str, str] | None = None
    """Prompts by name; `query` and `document` are used in training, evaluation and export. Unset: the model's own."""

    @field_validator("name_or_path", mode="before")
    @classmethod
    def _null_is_unset(cls, value: Any) -> Any:
        return "" if value is None else value

    @field_validator("freeze", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return _patterns(value)

    @property
    def title(self) -> str:
        """How the model is named to people."""
        joined = self.router.by_route if self.router else {}
        return self.name_or_path or " + ".join(f"{tower.name_or_path} ({name})" for name, tower in joined.items())

    @property
    def towers(self) -> "dict[str, ModelConfig]":
        """What is joined, by route, each with what the section says of all; empty where the model is one."""
        shared = self.model_copy(update={"router": None, "prompts": None, "freeze": (), "normalize": False})
        joined = self.router.by_route if self.router else {}
        return {name: shared.model_copy(update=tower.model_dump()) for name, tower in joined.items()}

    @property
    def pixel_limits(self) -> list[str]:
        """Keys that bound the pixels of pages, as far as they are set."""
        return [f"model.{name}" for name in ("min_pixels", "max_pixels") if getattr(self, name) is not None]

    @property
    def by_key(self) -> "dict[str, ModelConfig]":
        """The models that are loaded, by the key of the run file that names each."""
        return {f"model.router.{name}": tower for name, tower in self.towers.items()} or {"model.name_or_path": self}

    @model_validator(mode="after")
    def _one_model_or_joined(self) -> "ModelConfig":
        if self.name_or_path and self.router:
            raise ValueError("name_or_path and router are both given, and a run trains one model; take one of them out")
        if not self.name_or_path and not self.router:
            raise ValueError("'model.name_or_path' is missing; set it, or model.router, which joins several models")
        if self.router and self.revision is not None:
            raise ValueError("revision goes with name_or_path; give each model of router its own, router.text.revision")
        if self.router and self.lora is not None:
            raise ValueError(
                "lora adapts one model and router joins several; take it out, or freeze what is not to train"
            )
        return self

    @model_validator(mode="after")
    def _pixels_in_order(self) -> "ModelConfig":
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        return self


class SourceConfig(Section):
    """One of several sources of pairs, drawn from by its weight."""

    train: tuple[str, ...] = Field(min_length=1)
    """Shards of the source: paths, URLs, globs or braces."""
    corpus: tuple[str, ...] = ()
    """Shards of pages that the source's pairs name by pos_id and neg_ids, beside data.train_corpus."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the pairs that are drawn from it, relative to the other sources'; unset on all: by number of pairs."""

    @field_validator("train", "corpus", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return _patterns(value)


class DataConfig(Section):
    """Where the pairs are. Training and evaluation shards are named apart; no file may be in both."""

    train: tuple[str, ...] = ()
    """Training shards: paths, URLs (https, s3, hf), globs or braces such as pages-{000..031}.tar."""
    train_corpus: tuple[str, ...] = ()
    """Shards of pages that training pairs name by pos_id and neg_ids."""
    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    """Several sources of training pairs by name, in place of train: {slides: {train: a-*.tar, weight: 2}, ...}."""
    mixing: Literal["within_batch", "per_batch"] = "within_batch"
    """Whether a batch holds pairs of all sources by their weights, or of one source each."""
    tail: Literal["carry", "pad", "drop"] = "carry"
    """Pairs of an epoch that fill no batch: carried into the next epoch, a short batch, or left out."""
    shards_per_window: int | None = Field(default=None, ge=1)
    """Shards that are shuffled together, so that a batch touches few of them; unset shuffles over all."""
    eval: tuple[str, ...] = ()
    """Evaluation shards: their queries are searched in their pages."""
    eval_corpus: tuple[str, ...] = ()
    """Shards of further pages that join the evaluation corpus; evaluation pairs may name them by pos_id and neg_ids."""
    negatives: tuple[str, ...] = ()
    """Files of `farnear mine` with hard negatives of training pairs, in place of those that the shards hold."""
    num_negatives: int | None = Field(default=None, ge=0)
    """Hard negatives used of each pair in training; unset uses all that there are."""
    exclude: tuple[str, ...] = ()
    """Files of JSON lines with "shard" and "key", such as a former run's quarantine.jsonl: pairs to leave out."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Share of the training pairs that may be lost to damaged shards and undecodable pages before the run stops."""
    max_image_pixels: int = Field(default=89_478_485, ge=1, le=178_956_970)
    """Images with more pixels (width x height, by their header) are not decoded and their pairs not used."""
    cache_dir: str | None = None
    """Folder for indexes, plans and remote shards; unset: $FARNEAR_CACHE, else ~/.cache/farnear."""
    remote: Literal["cache", "ranges"] = "cache"
    """Shards behind URLs: downloaded whole into the cache, or read pair by pair."""
    remote_cache_gb: float | None = Field(default=None, gt=0)
    """Most disk, in 10^9 bytes, that downloaded shards take on a node; the least recently used go. Unset: no limit."""
    remote_prefetch_shards: int = Field(default=4, ge=0)
    """Shards behind URLs that a rank downloads ahead of the step that needs them."""
    dataloader_num_workers: int = Field(default=2, ge=0)
    """Worker processes a rank that read, decode and preprocess; 0 does it in the training process."""
    dataloader_prefetch_factor: int = Field(default=4, ge=1)
    """Mini-batches each worker prepares ahead."""

    @field_validator("train", "train_corpus", "eval", "eval_corpus", "negatives", "exclude", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return _patterns(value)

    @model_validator(mode="after")
    def _one_way_to_name_the_pairs(self) -> "DataConfig":
        if not self.train and not self.sources:
            raise ValueError("no training shards are named; set data.train, or data.sources with a train each")
        if self.train and self.sources:
            raise ValueError(
                "data.train and data.sources both name training shards; make data.train one of the sources"
            )
        weighted = [source.weight is not None for source in self.sources.values()]
        if any(weighted) and not all(weighted):
            raise ValueError("some sources have a weight and some have none; give one to each, or to none")
        return self

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Of the sources in their order; None where pairs count alike."""
        weights = tuple(source.weight for source in self.sources.values() if source.weight is not None)
        return weights or None


class LossConfig(Section):
    """The objective: InfoNCE over the whole global batch, summed over Matryoshka dimensions, or a function of yours."""

    function: str | None = None
    """A loss of your own as package.module:function, in place of InfoNCE; see farnear.loss.own."""
    gather: bool = True
    """Whether your own function is given the embeddings of all ranks or those of its rank alone."""
    scale: float = Field(default=20.0, gt=0)
    """Factor on the cosine similarities: the inverse of the temperature."""
    learn_scale: bool = False
    """Whether the scale is trained, beginning at `scale`, by its logarithm and with an optimizer of its own."""
    scale_learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of the trained scale's logarithm; unset: training.learning_rate. It has the same schedule."""
    max_scale: float = Field(default=100.0, gt=0)
    """Bound of a trained scale, as in CLIP."""
    directions: tuple[Direction, ...] = ("query_to_doc",)
    """Which similarities take part: query_to_doc, and any of query_to_query, doc_to_query, doc_to_doc."""
    partition_mode: Literal["joint", "per_direction"] = "joint"
    """One softmax over all directions, or one for each, averaged (for query_to_doc with doc_to_query)."""
    hardness_mode: Literal["in_batch_negatives", "hard_negatives", "all_negatives"] | None = None
    """Which negatives count more the more similar they are to the query; unset: none."""
    hardness_strength: float = Field(default=0.0, ge=0)
    """Factor on the cosine that hardness_mode adds to a negative's score; 5 to 9 in the literature."""
    margin: float | None = Field(default=None, ge=-1, le=1)
    """Leave out negatives more similar than the positive less this margin, as likely false negatives; unset: none."""
    margin_strategy: Literal["absolute", "relative"] = "absolute"
    """Whether the margin is taken from the positive's cosine or is a share of it."""
    distillation: Literal["margin_mse", "listwise_distillation"] | None = None
    """Adds a term that holds a pair's scores to those of a teacher, which data.negatives names; unset: none."""
    distillation_weight: float = Field(default=1.0, gt=0)
    """Factor on that term."""
    distillation_temperature: float = Field(default=1.0, gt=0)
    """Of both softmaxes in listwise_distillation."""
    contrastive_weight: float = Field(default=1.0, ge=0)
    """Factor on InfoNCE beside distillation; 0 trains by distillation alone."""
    matryoshka_dims: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Prefixes of the embedding that are trained to work alone. The losses of all dims are summed."""
    matryoshka_weights: tuple[float, ...] | None = None
    """Weight of each dim's loss, in the order of matryoshka_dims; unset means 1 for each."""

    @model_validator(mode="after")
    def _directions_make_a_loss(self) -> "LossConfig":
        if "query_to_doc" not in self.directions:
            raise ValueError("directions needs query_to_doc: it holds the pairs that are pulled together")
        if len(set(self.directions)) != len(self.directions):
            raise ValueError("directions names one twice")
        without_positive = {"query_to_query", "doc_to_doc"} & set(self.directions)
        if self.partition_mode == "per_direction" and without_positive:
            raise ValueError(
                f"partition_mode per_direction takes a softmax for each direction, and {min(without_positive)} has no "
                "positive in it; use joint"
            )
        if (self.hardness_mode is None) != (self.hardness_strength == 0):
            raise ValueError("hardness_mode and a hardness_strength above 0 belong together; set both or neither")
        if self.margin is None and self.margin_strategy != "absolute":
            raise ValueError("margin_strategy is set, but margin is not")
        return self

    @model_validator(mode="after")
    def _scale_is_learned_in_bounds(self) -> "LossConfig":
        if self.learn_scale and self.scale > self.max_scale:
            raise ValueError(
                f"scale {self.scale} is above max_scale {self.max_scale}, where a trained scale may not go"
            )
        for name in ("scale_learning_rate", "max_scale"):
            if not self.learn_scale and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is set, but learn_scale is not")
        return self

    @model_validator(mode="after")
    def _distillation_has_its_options(self) -> "LossConfig":
        defaults = type(self).model_fields

        def first_set(*names: str) -> str | None:
            return next((name for name in names if getattr(self, name) != defaults[name].default), None)

        if self.distillation is None:
            if odd := first_set("distillation_weight", "distillation_temperature", "contrastive_weight"):
                raise ValueError(f"{odd} is set, but distillation is not")
            return self
        if self.function is not None:
            raise ValueError(
                f"distillation is added to InfoNCE, but function {self.function} takes its place; take one out"
            )
        if self.distillation != "listwise_distillation" and first_set("distillation_temperature"):
            raise ValueError(
                f"distillation_temperature belongs to listwise_distillation, not to {self.distillation}; take it out"
            )
        if self.contrastive_weight == 0 and (odd := first_set(*_OF_SOFTMAX)):
            raise ValueError(f"{odd} belongs to InfoNCE, which contrastive_weight: 0 leaves out; take one out")
        return self

    @model_validator(mode="after")
    def _own_function_decides_alone(self) -> "LossConfig":
        if self.function is None:
            if not self.gather:
                raise ValueError(
                    "gather: false is for a function of your own; InfoNCE takes its negatives from all ranks"
                )
            return self
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.function):
            raise ValueError(f"function is package.module:function, not {self.function!r}")
        defaults = LossConfig()
        if odd := [name for name in _OF_INFONCE if getattr(self, name) != getattr(defaults, name)]:
            raise ValueError(f"{odd[0]} belongs to InfoNCE, but function {self.function} takes its place; take it out")
        return self

    @model_validator(mode="after")
    def _weights_match_dims(self) -> "LossConfig":
        if self.matryoshka_weights is not None:
            if self.matryoshka_dims is None:
                raise ValueError("matryoshka_weights needs matryoshka_dims")
            if len(self.matryoshka_weights) != len(self.matryoshka_dims):
                raise ValueError(
                    f"matryoshka_weights has {len(self.matryoshka_weights)} values for "
                    f"{len(self.matryoshka_dims)} matryoshka_dims; give one a dim"
                )
            if min(self.matryoshka_weights) <= 0:
                raise ValueError("matryoshka_weights must be positive; take a dim out instead of giving it no weight")
        if self.matryoshka_dims is not None:
            if min(self.matryoshka_dims) < 1:
                raise ValueError("matryoshka_dims must be positive")
            if len(set(self.matryoshka_dims)) != len(self.matryoshka_dims):
                raise ValueError("matryoshka_dims names a dim twice")
        return self


class TrainingConfig(Section):
    """How the model is optimised, saved and reported."""

    global_batch_size: int = Field(default=64, ge=2, le=2**20)
    """Pairs in one optimizer step, over all ranks. Every pair is a negative for every other."""
    mini_batch_size: PositiveInt | dict[Side, PositiveInt] | None = None
    """Most inputs in a mini-batch, or by side: {query: N, document: N}, a reranker's pair; unset: 8, or num_tokens."""
    mini_batch_num_tokens: NumTokens | dict[Side, NumTokens] | None = None
    """Most tokens in one, visual ones and padding too, or by side as above; auto: what memory and speed say."""
    no_grad_mini_batch_factor: int = Field(default=4, ge=1)
    """Mini-batches that go through the pass without graph together. Dropout, which has to be replayed, turns it off."""
    keep_graphs: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = 0.0
    """Share of the mini-batches that keep their graph and are computed once; auto: as many as memory has room for."""
    frozen_cache_gb: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Host memory a rank, in 10^9 bytes, to keep outputs of frozen parts in; auto: a quarter of the free; 0: off."""
    optim: Literal["adamw_torch", "adamw_8bit"] = "adamw_torch"
    """AdamW, or AdamW whose moments take a quarter of the memory: bitsandbytes on a GPU, under single and ddp."""
    learning_rate: float = Field(default=2e-5, gt=0, le=100)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(default=0.0, ge=0, le=100)
    """Decoupled weight decay; biases and norms are left out, as in transformers."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    lr_scheduler_type: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup_steps: float = Field(default=0, ge=0)
    """Steps of linear warm-up; below 1 it is a share of all steps. It takes precedence over warmup_ratio."""
    warmup_ratio: float = Field(default=0.0, ge=0, le=1)
    """Warm-up as a share of all steps."""
    num_train_epochs: float = Field(default=1.0, gt=0, le=1_000_000)
    """Passes over the training pairs; may be a fraction."""
    max_steps: int = -1
    """Optimizer steps in all; when positive it overrides num_train_epochs."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    bf16: bool = False
    """bf16 compute with fp32 master weights and fp32 accumulation."""
    fp16: bool = False
    """fp16 compute with fp32 master weights and dynamic loss scaling, for GPUs that have no bf16."""
    pure_bf16: bool = False
    """bf16 weights and optimizer moments too: half the memory, and small updates are lost to rounding."""
    reduce: Literal["step", "mini_batch"] = "step"
    """When gradients meet: once a step and whole on every rank until then, or after each mini-batch, kept in parts."""
    reshard: Literal["forward", "step"] = "forward"
    """zero3, fsdp2: when gathered parameters are given back. step keeps them, all of them, until the optimizer step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. With small mini-batches it is rarely needed."""
    logging_steps: int = Field(default=10, ge=1)
    """Steps between progress lines. metrics.jsonl always holds every step."""
    save_steps: float = Field(default=500, ge=0)
    """Steps between checkpoints; below 1 a share of all steps; 0 saves at the end only."""
    save_total_limit: int | None = Field(default=None, ge=1)
    """The newest so many of them are kept; the best one always is, beside them."""
    keep_every_n_steps: int | None = Field(default=None, ge=1)
    """Checkpoints of steps that are a multiple of it are kept beyond save_total_limit."""
    async_save: bool = True
    """Whether the training goes on while a checkpoint is written, from a copy in host memory; false waits for it."""
    verify_checkpoints: bool = True
    """Whether a checkpoint's files are hashed before they are loaded; names and sizes are always looked at."""
    ddp_timeout: float = Field(default=300.0, ge=5)
    """Seconds without progress of any rank after which a run, once past its first step, is taken to hang and ends."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """When a step's loss or gradient is not finite: stop the run, or leave the step out, at most ten in a row."""
    loss_spike_threshold: float | None = Field(default=None, gt=0)
    """A loss so many times the usual spread above the median of those before it is a spike; unset: none is."""
    loss_spike_window: int = Field(default=50, ge=8)
    """Losses that are looked back over, once there are eight."""
    on_loss_spike: Literal["rollback", "stop"] = "rollback"
    """On a spike: return to the newest checkpoint's weights and go on with the next batch, or stop the run."""
    load_best_model_at_end: bool = False
    """Whether the best checkpoint by the evaluations, not the last one, is evaluated and exported at the end."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Trackers beside metrics.jsonl, by accelerate's names: tensorboard, wandb, trackio, mlflow, ...; or none."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker_or_none(cls, value: Any) -> Any:
        if isinstance(value, str):
            return () if value == "none" else (value,)
        return value

    @field_validator("mini_batch_size", "mini_batch_num_tokens", "keep_graphs", "frozen_cache_gb", mode="before")
    @classmethod
    def _one_complaint(cls, value: Any, info: ValidationInfo) -> Any:
        """Say what is wrong in one line; for a union of types pydantic has one line a type."""
        name = str(info.field_name)
        is_auto = name != "mini_batch_size"
        auto = ", or auto" if is_auto else ""
        if name in ("keep_graphs", "frozen_cache_gb"):
            low, high, most = (0.0, 1.0, " to 1") if name == "keep_graphs" else (0.0, math.inf, " on")
            if not (_is_number(value, float) and low <= value <= high) and value != "auto":
                raise ValueError(f"a number from 0{most}{auto}, not {value!r}")
            return value
        if value is None:
            return value
        of_sides = value if isinstance(value, dict) else {"query": value}
        if not of_sides.keys() <= {"query", "document", "pair"}:
            raise ValueError(f"the keys are query, document and pair, not {', '.join(map(str, of_sides))}")
        for one in of_sides.values():
            if not (_is_number(one, int) and one >= 1) and not (is_auto and one == "auto"):
                raise ValueError(f"a whole number from 1 on{auto}, or one for each side, not {one!r}")
        return value

    @field_validator("save_steps")
    @classmethod
    def _whole_or_a_share(cls, value: float) -> float:
        return interval(value)

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """The type that is computed in."""
        return "bf16" if self.bf16 or self.pure_bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def mini_batch_size_of(self) -> dict[str, int | None]:
        """Most inputs of a mini-batch of each side; None for no bound."""
        given, tokens = _of_sides(self.mini_batch_size), self.mini_batch_num_tokens_of
        return {side: given[side] or (None if tokens[side] else 8) for side in given}

    @property
    def mini_batch_num_tokens_of(self) -> dict[str, NumTokens | None]:
        """Most tokens of a mini-batch of each side; None for no bound."""
        return _of_sides(self.mini_batch_num_tokens)

    @model_validator(mode="after")
    def _one_meaning_of_bf16(self) -> "TrainingConfig":
        if self.bf16 and self.pure_bf16:
            raise ValueError("bf16 keeps fp32 weights and pure_bf16 does not; set one of them")
        if self.fp16 and (self.bf16 or self.pure_bf16):
            raise ValueError("fp16 and bf16 are two ways to compute; set one of them, bf16 where the GPU has it")
        if self.loss_spike_threshold is None:
            for name in ("loss_spike_window", "on_loss_spike"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is set, but loss_spike_threshold is not")
        if self.keep_every_n_steps is not None and self.save_total_limit is None:
            raise ValueError("keep_every_n_steps is set, but save_total_limit is not, so that all checkpoints are kept")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError("max_steps is a positive number, or -1 to go by num_train_epochs")
        return self


class EvaluationConfig(Section):
    """Retrieval measured in the run: before training, every eval_steps, and at the end."""

    eval_on_start: bool = True
    """Whether the untrained model is measured too, on all evaluation queries."""
    eval_steps: float | None = Field(default=None, gt=0)
    """Steps between evaluations on the sample; below 1 a share of all steps; unset means none between start and end."""
    sample_queries: int = Field(default=500, ge=1)
    """Queries in the fixed sample that is measured during the run. Start and end always measure all."""
    sample_pages: int = Field(default=2000, ge=1)
    """Pages in that sample; the pages relevant to the sampled queries are always among them."""
    per_device_eval_batch_size: int = Field(default=16, ge=1)
    """Queries or pages that are embedded at once on one rank."""
    embedder: str | None = None
    """For a reranker: the embedder whose nearest pages it ranks; unset: a query's pages, hard negatives, any others."""
    rerank_k: int = Field(default=30, ge=10)
    """For a reranker: pages of each query that it reranks; measures look at ten, so no fewer."""
    metric_for_best_model: Literal["ndcg@1", "ndcg@5", "ndcg@10", "recall@1", "recall@5", "recall@10", "mrr@10"] = (
        "ndcg@10"
    )
    """Measure, at the full dimension, by which the best checkpoint is chosen."""

    @field_validator("eval_steps")
    @classmethod
    def _whole_or_a_share(cls, value: float | None) -> float | None:
        steps: float | None = interval(value)
        return steps
