"""`farnear evaluate` and `farnear compare`: how well models find pages, each for itself and side by side."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from farnear.command_line import Parser, parted, positive
from farnear.commands.encode import exported
from farnear.errors import UserError
from farnear.wording import printable

if TYPE_CHECKING:
    from farnear.retrieve.side_by_side import Subject

MEASURES = ("ndcg@1", "ndcg@5", "ndcg@10", "recall@1", "recall@5", "recall@10", "recall@100", "mrr@10", "map@100")


def add_evaluate(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add both commands."""
    parser = _parser(
        commands,
        "evaluate",
        help="measure models on shards of pairs: nDCG, recall, MRR, MAP by dimension",
        description="Embed the queries and pages of some shards with each model and measure what the queries find: by "
        "Matryoshka dimension, with the bytes and the time of an index. Left in the folder --out: embeddings, "
        "results.json and a TREC run file of each model.",
        epilog="examples:\n"
        "  farnear evaluate runs/mine --data 'data/eval-*.tar'\n"
        "  farnear evaluate Qwen/Qwen3-VL-Embedding-2B runs/mine runs/mine/checkpoints/step-00000500 \\\n"
        "    --precision float32 int8 binary model.max_pixels=360000\n\n"
        "docs/evaluation.md says more.",
    )
    parser.set_defaults(command=_evaluate)
    parser = _parser(
        commands,
        "compare",
        help="compare models with the first: what changed, how surely, and for which queries",
        description="Measure models as `farnear evaluate` does, and compare every one with the first: differences with "
        "paired bootstrap intervals, and the queries that got better and worse. Left in --out beside what evaluate "
        "leaves: comparison.json and queries.csv. MODEL may be a folder of `farnear encode`.",
        epilog="examples:\n"
        "  farnear compare Qwen/Qwen3-VL-Embedding-2B runs/mine\n"
        "  farnear compare embeddings/base embeddings/tuned --dims 2048 512 64 --precision float32 binary",
    )
    parser.add_argument(
        "--measure", choices=MEASURES, default="ndcg@10", help="that queries are compared by (default: %(default)s)"
    )
    parser.add_argument("--resamples", type=positive, default=10_000, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    parser.set_defaults(command=_compare)


def _parser(
    commands: "argparse._SubParsersAction[Parser]", name: str, *, help: str, description: str, epilog: str
) -> Parser:
    parser = commands.add_parser(name, help=help, description=description, epilog=epilog)
    parser.add_argument(
        "overrides",
        metavar="MODEL [key=value]",
        nargs="*",
        default=[],
        help="a model's folder or name on the hub, a run's folder, a checkpoint (RUN/best too), or embeddings; keys of "
        "a run file",
    )
    parser.add_argument(
        "--data", metavar="SHARDS", nargs="+", help="of pairs (default: data.eval of a run among MODEL)"
    )
    parser.add_argument("--corpus", metavar="SHARDS", nargs="+", default=[], help="shards of further pages")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder of results (default: %(default)s)")
    parser.add_argument(
        "--dims", type=positive, nargs="+", help="(default: all components, and those trained to work alone)"
    )
    parser.add_argument(
        "--precision", nargs="+", choices=("float32", "int8", "binary"), default=["float32"], help="of the pages"
    )
    parser.add_argument(
        "--rescore_multiplier",
        type=positive,
        default=1,
        help="of binary pages, how many times as many are found and put in order by the query itself (default: 1)",
    )
    parser.add_argument("--num_processes", type=positive, help="ranks (default: as many as GPUs, or one)")
    return parser


def _evaluate(arguments: argparse.Namespace) -> int:
    subjects, code = _measured(arguments)
    if code:
        return code
    from farnear.retrieve.side_by_side import write_results
    from farnear.retrieve.side_by_side_text import quality_table

    write_results(arguments.out, subjects)
    print(f"\n{quality_table(subjects)}\n\n{_where(arguments.out, subjects)}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    if len(_asked(arguments).models) < 2:
        raise UserError(
            "compare takes two models or more, the first of which the others are compared with; name another"
        )
    subjects, code = _measured(arguments)
    if code:
        return code
    from farnear.retrieve.side_by_side import compare, query_changes, write_comparison, write_results
    from farnear.retrieve.side_by_side_text import changes_text, comparison_table, quality_table

    baseline, *others = subjects
    compared = compare(subjects, resamples=arguments.resamples, seed=arguments.seed)
    write_results(arguments.out, subjects)
    write_comparison(arguments.out, subjects, compared, arguments.measure)
    print(f"\n{quality_table(subjects)}\n\n{comparison_table(baseline, compared, arguments.measure)}")
    for other in others:
        print(f"\n{changes_text(other.name, query_changes(baseline, other, arguments.measure), arguments.measure)}")
    print(f"\n{_where(arguments.out, subjects)}; every query is in {arguments.out / 'queries.csv'}")
    return 0


@dataclass(frozen=True)
class _Asked:
    """What the words of the command line say.

    Attributes:
        shards: None where no ``--data`` names any.
        overrides: Values as in a run file.
    """

    models: list[str]
    shards: list[str] | None
    corpus: list[str]
    overrides: list[str]


def _asked(arguments: argparse.Namespace) -> _Asked:
    models, overrides = parted(arguments.overrides)
    # Options that take several words take the values behind them too.
    shards, of_data = parted(arguments.data or [])
    corpus, of_corpus = parted(arguments.corpus)
    if not models:
        raise UserError(
            "no model is named; name a folder, a model on the hub, or a run, and before --data, --corpus, --dims and "
            "--precision, which take all words after them"
        )
    ranks = [] if arguments.num_processes is None else [f"num_processes={arguments.num_processes}"]
    return _Asked(models, shards or None, corpus, [*overrides, *of_data, *of_corpus, *ranks])


def _measured(arguments: argparse.Namespace) -> tuple[list["Subject"], int]:
    """Every model measured; or, where embedding with one has failed, its exit code."""
    asked = _asked(arguments)
    names = dict(zip(short_names(asked.models), asked.models, strict=True))
    stored = {name: Path(word) for name, word in names.items() if (Path(word) / "documents.npy").is_file()}
    others = {name: word for name, word in names.items() if name not in stored}
    if not others and (asked.shards or asked.corpus or asked.overrides):
        raise UserError(
            "every model is there as embeddings, so --data, --corpus, --num_processes and keys of a run file are read "
            "by nobody; take them out"
        )
    code = _embed(others, asked, arguments.out) if others else 0
    if code:
        return [], code
    from farnear.retrieve.collection import open_collection
    from farnear.retrieve.side_by_side import measured

    folders = {name: stored.get(name, _embeddings(arguments.out, name)) for name in names}
    collections = {name: open_collection(folder) for name, folder in folders.items()}
    return measured(collections, arguments.dims, arguments.precision, arguments.rescore_multiplier), 0


def _embed(words: Mapping[str, str], asked: _Asked, out: Path) -> int:
    """Have each model, by its name, embed the shards, unless it has. Returns the exit code of the first that failed."""
    from farnear.launching.encoding import encode, encoding_config, named_model
    from farnear.launching.local import tell_of_missing_folder

    for word in words.values():
        tell_of_missing_folder(word)
    models = {name: named_model(word, out / name / "model") for name, word in words.items()}
    runs = [model.run for model in models.values() if model.run is not None]
    shards, corpus = asked.shards, asked.corpus
    if shards is None:
        run = next((run for run in runs if run.data.eval), None)
        if run is None:
            raise UserError("no shards are named, and no run that has data.eval; name shards of pairs with --data")
        shards, corpus = list(run.data.eval), [*corpus, *run.data.eval_corpus]
    beside = runs[0] if runs else None
    configs = {
        name: encoding_config(model, shards, corpus, asked.overrides, _embeddings(out, name), beside)
        for name, model in models.items()
    }
    for name, config in configs.items():
        exported(models[name])
        about = {"matryoshka_dims": models[name].matryoshka_dims}
        if code := encode(config, _embeddings(out, name), truncate_dim=None, precision="float32", about=about):
            return code
    return 0


def _embeddings(out: Path, name: str) -> Path:
    return out / name / "embeddings"


def short_names(words: Sequence[str]) -> list[str]:
    """What models are called in tables and folders: as much of each word's end as tells it from the others.

    `runs/a/export` is `a`, for an export is called by its run.
    """
    parts = [_parts(Path(word)) or _parts(Path(word).absolute()) or ["model"] for word in words]
    names = [of_word[-1] for of_word in parts]
    for length in range(2, max(map(len, parts)) + 1):
        shared = {name for name in names if names.count(name) > 1}
        names = [
            "-".join(of_word[-length:]) if name in shared else name for name, of_word in zip(names, parts, strict=True)
        ]
    if twice := [word for word, name in zip(words, names, strict=True) if names.count(name) > 1]:
        raise UserError(f"{twice[-1]} is named twice, and would be compared with itself; name it once")
    return names


def _parts(path: Path) -> list[str]:
    """Of a path what can be part of a name: folders are called by it, and lines of tables."""
    left_out = ("/", "..", ".", "export", "checkpoints")
    return [printable(part) for part in Path(os.path.normpath(path)).parts if part not in left_out]


def _where(out: Path, subjects: Sequence["Subject"]) -> str:
    return f"results.json and run.trec of {', '.join(one.name for one in subjects)} are in {out}"
