"""`farnear demo --reranker`: how both models make each other better, in minutes, by a flywheel file like any other.

    embedder -> the pages that it takes for answers -> reranker -> its judgement of such pages -> a better embedder

The pages come in families that differ in one attribute (`siblings` of `farnear.ingest.synthetic`), which an embedder
of so few steps mixes up. The reranker begins as that embedder, whose vision tower can read by then, and gets a head of
random weights.

What the settings are held to: a step of a reranker costs as many pages as its lists hold, so half of the negatives
are other pairs' pages of the batch, which cost no page more; its template says nothing but the query and the page, for
a random model understands no instruction, and that is a third of the tokens; and the mined negatives are any of the
hundred nearest pages, since the nearest dozen show one and the same combination, drawn anew.
"""

import argparse
import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from farnear.demo import RUN_FILE, empty_folder, of_arguments, read_shards, save_examples
from farnear.flywheel_file import read_flywheel
from farnear.launching.flywheel import launch_flywheel, results

TRAIN_PAIRS = 6400
EVAL_PAIRS = 240
PAGE_SIZE = (96, 128)
STEPS = {"embedder": 50, "reranker": 300, "distilled": 50}

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


def run_reranker_demo(arguments: argparse.Namespace) -> int:
    """Draw, turn the flywheel once, and say what came of it, in a table and in JSON. Returns the exit code.

    Args:
        arguments: As `farnear.demo.run_demo` takes them.

    Raises:
        UserError: The folder holds something else, or a launch met a user's mistake.
    """
    started = time.monotonic()
    out = empty_folder(arguments.out or Path("runs/demo-reranker"))
    file = out / RUN_FILE
    file.write_text(yaml.safe_dump(flywheel(out, of_arguments(arguments)), sort_keys=False), encoding="utf-8")
    print(f"drawing {TRAIN_PAIRS} training and {EVAL_PAIRS} evaluation pages, in families", flush=True)
    prepare(out, arguments.seed)
    code = launch_flywheel(file, [])
    if code == 0:
        print(closing_words(out, results(read_flywheel(file)), time.monotonic() - started), flush=True)
    return code


def closing_words(out: Path, of_stage: Mapping[str, Mapping[str, Any]], seconds: float) -> str:
    """How to use both models, in lines that work as they stand, and the figures as JSON, on the last line."""
    query, pages = save_examples(out)
    first, reranker, last = (of_stage[name] for name in ("embedder", "reranker", "distilled"))
    return "\n".join(
        [
            "",
            f"nDCG@10 on {EVAL_PAIRS} pages never seen, in families that differ in one attribute ({seconds:.0f} s)",
            f"{first['ndcg@10']:>8.3f}  the embedder",
            f"{reranker['ndcg@10']:>8.3f}  the pages that it finds, in the reranker's order",
            f"{last['ndcg@10']:>8.3f}  the embedder, trained on with what it mixed up and the reranker's scores of it",
            "",
            f"the models are in {out / 'distilled' / 'export'} and {out / 'reranker' / 'export'}; which of three",
            "unseen pages answers a query? The first one:",
            "",
            "    from sentence_transformers import CrossEncoder",
            f"    model = CrossEncoder({str(out / 'reranker' / 'export')!r})",
            f"    print(model.predict([({query!r}, page) for page in {pages}]))",
            "",
            json.dumps(
                {
                    "ndcg@10_embedder": first["ndcg@10"],
                    "ndcg@10_reranked": reranker["ndcg@10"],
                    "ndcg@10_after_flywheel": last["ndcg@10"],
                    "seconds_per_query": reranker["seconds_per_query"],
                    "seconds_of_stage": {name: result["seconds"] for name, result in of_stage.items()},
                    "seconds": round(seconds, 1),
                }
            ),
        ]
    )


def flywheel(out: Path, shared: Mapping[str, Any]) -> dict[str, Any]:
    """The flywheel file, as a user would write it.

    Args:
        out: Its output_dir, where `prepare` has put the base model, the shards and the template.
        shared: Keys that all stages share.
    """
    schedule = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.05, "save_steps": 0}
    mining = {"num_negatives": 3, "range_max": 100, "sampling_strategy": "random"}
    return {
        "output_dir": str(out),
        **shared,
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
                        "max_steps": STEPS["embedder"],
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
                        "max_steps": STEPS["reranker"],
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
                        "max_steps": STEPS["distilled"],
                    },
                },
            },
        },
    }


def prepare(out: Path, seed: int) -> None:
    """Draw the shards, make the base model, whose tokenizer knows the training queries, and write the template."""
    # Imported here: torch and transformers take seconds, which `farnear --help` should not.
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
