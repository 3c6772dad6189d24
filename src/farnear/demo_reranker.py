"""What `farnear demo --reranker` trains on, and its flywheel file: how both models make each other better, in minutes.

    embedder -> the pages that it takes for answers -> reranker -> its judgement of such pages -> a better embedder

The pages come in families that differ in one attribute (`siblings` of `farnear.ingest.synthetic`), which an embedder
of so few steps mixes up. The reranker begins as that embedder, whose vision tower can read by then, and gets a head of
random weights.

What the settings are held to: a step of a reranker costs as many pages as its lists hold, so half of the negatives
are other pairs' pages of the batch, which cost no page more; its template says nothing but the query and the page, for
a random model understands no instruction, and that is a third of the tokens; and the mined negatives are any of the
hundred nearest pages, since the nearest dozen show one and the same combination, drawn anew.
"""

import warnings
from pathlib import Path
from typing import Any

TRAIN_PAIRS = 6400
EVAL_PAIRS = 240
PAGE_SIZE = (96, 128)

TEMPLATE = """\
{%- macro content(message) -%}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == "image" -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == "text" -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}<|im_start|>{{ content(message) }}<|im_end|>{%- endfor -%}
"""


def flywheel(out: Path, *, strategy: str, ranks: int, seed: int) -> dict[str, Any]:
    """The flywheel file, as a user would write it.

    Args:
        out: Its output_dir, where `prepare` has put the base model, the shards and the template.
    """
    schedule = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.05, "save_steps": 0}
    mining = {"num_negatives": 3, "range_max": 100, "sampling_strategy": "random"}
    return {
        "output_dir": str(out),
        "strategy": strategy,
        "num_processes": ranks,
        "seed": seed,
        "data": {
            "train": str(out / "data" / "train-*.tar"),
            "eval": str(out / "data" / "eval-*.tar"),
            "dataloader_num_workers": 1,
        },
        "evaluation": {"eval_on_start": False, "per_device_eval_batch_size": 50},
        "stages": {
            "embedder": {
                "train": {
                    "model": {"name_or_path": str(out / "base")},
                    "training": {
                        **schedule,
                        "global_batch_size": 128,
                        "mini_batch_size": 16,
                        "learning_rate": 1e-3,
                        "max_steps": 50,
                    },
                },
            },
            "negatives": {"mine": {"model": {"name_or_path": "{embedder}"}, "mining": mining}},
            "reranker": {
                "train": {
                    "model": {"name_or_path": "{embedder}"},
                    "data": {"negatives": "{negatives}"},
                    "reranker": {
                        "head": "linear",
                        "num_negatives": 3,
                        "chat_template": str(out / "reranker.jinja"),
                    },
                    "training": {
                        **schedule,
                        "global_batch_size": 32,
                        "mini_batch_size": {"pair": 64, "document": 32},
                        "learning_rate": 7e-4,
                        "max_steps": 300,
                    },
                    "evaluation": {"embedder": "{embedder}", "rerank_k": 20},
                },
            },
            "judged": {
                "mine": {
                    "model": {"name_or_path": "{embedder}"},
                    "mining": {**mining, "reranker": "{reranker}", "reranker_margin": None},
                },
            },
            "distilled": {
                "train": {
                    "model": {"name_or_path": "{embedder}"},
                    "data": {"negatives": "{judged}"},
                    "loss": {"distillation": "listwise_distillation", "distillation_weight": 0.5},
                    "training": {
                        **schedule,
                        "global_batch_size": 64,
                        "mini_batch_size": 16,
                        "learning_rate": 5e-4,
                        "max_steps": 50,
                    },
                },
            },
        },
    }


def prepare(out: Path, seed: int) -> None:
    """Draw the shards, make the base model, whose tokenizer knows the training queries, and write the template."""
    # Imported here: torch and transformers take seconds, which `farnear --help` should not.
    from farnear.demo import read_shards
    from farnear.ingest.synthetic import synthesise
    from farnear.model.tiny import save_tiny_model

    with warnings.catch_warnings():
        # The training combinations come again, drawn anew; the plan keeps equal queries apart.
        warnings.filterwarnings("ignore", message=".*queries repeat")
        train, _ = synthesise(
            out / "data", train_pairs=TRAIN_PAIRS, eval_pairs=EVAL_PAIRS, seed=seed, size=PAGE_SIZE, siblings=True
        )
    reader = read_shards(train[:1])
    save_tiny_model(out / "base", texts=[reader[row] for row in reader.index.query_N.tolist()], seed=seed)
    (out / "reranker.jinja").write_text(TEMPLATE, encoding="utf-8")
