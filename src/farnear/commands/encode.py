"""`farnear encode`: the embeddings of pages, and of queries that ask for them, as files."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from farnear.command_line import Parser, parted, positive
from farnear.commands.rank import work_on_rank
from farnear.environment import prepare_environment

if TYPE_CHECKING:
    from farnear.launching.encoding import NamedModel
    from farnear.signals import Signals


def add_encode(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "encode",
        help="embed the pages and queries of shards into .npy files",
        description="Embed every page of some shards, and every query in them, with all ranks: documents.npy and "
        "document-ids.txt, and where there are queries queries.npy, query-ids.txt and qrels.txt. Killed and started "
        "again it goes on.",
        epilog="examples:\n"
        "  farnear encode runs/mine 'data/corpus-*.tar' embeddings\n"
        "  farnear encode Qwen/Qwen3-VL-Embedding-2B 'data/eval-*.tar' embeddings --truncate_dim 512 \\\n"
        "    --precision int8 model.max_pixels=360000 training.bf16=true\n\n"
        "docs/evaluation.md says more.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a model's folder or name on the hub, a run, or a checkpoint (RUN/best too)"
    )
    parser.add_argument("shards", metavar="SHARDS", help="of pairs or of pages: a path, URL, glob or braces")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="as in a run file")
    parser.add_argument("--corpus", metavar="SHARDS", nargs="+", default=[], help="shards of further pages")
    parser.add_argument("--truncate_dim", type=positive, help="components to keep (default: all)")
    parser.add_argument(
        "--precision",
        choices=("float32", "int8", "binary"),
        default="float32",
        help="of the pages, as in sentence-transformers; queries stay float32 (default: %(default)s)",
    )
    parser.add_argument("--num_processes", type=positive, help="ranks (default: as many as GPUs, or one)")
    parser.set_defaults(command=_encode)


def _encode(arguments: argparse.Namespace) -> int:
    from farnear.launching.encoding import encode, encoding_config, named_model

    model = exported(named_model(arguments.model, arguments.out / "model"))
    # An option that takes several words takes those too.
    corpus, keys = parted(arguments.corpus)
    overrides = [*arguments.overrides, *keys]
    if arguments.num_processes is not None:
        overrides.append(f"num_processes={arguments.num_processes}")
    config = encoding_config(model, [arguments.shards], corpus, overrides, arguments.out)
    about = {"matryoshka_dims": model.matryoshka_dims}
    return encode(
        config, arguments.out, truncate_dim=arguments.truncate_dim, precision=arguments.precision, about=about
    )


def exported(model: "NamedModel") -> "NamedModel":
    """The model, once a checkpoint that it is to be has been exported.

    Raises:
        UserError: The checkpoint is torn, or its base model is gone.
    """
    if model.checkpoint is None:
        return model
    prepare_environment()
    from farnear.noise import quiet

    quiet()
    from farnear.training.exporting import export_once

    export_once(model.checkpoint, Path(model.name_or_path))
    return model


def rank_command(words: list[str]) -> int:
    """What launch/encode.py does on each rank. Returns the exit code."""
    parser = Parser(prog="launch/encode.py", description="One rank of farnear encode.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("config", type=json.loads, help="as a run file has it")
    parser.add_argument("encoding", type=json.loads)
    return work_on_rank(parser, words, _encode_on_rank)


def _encode_on_rank(arguments: argparse.Namespace, signals: "Signals") -> None:
    from farnear.config import parse_config
    from farnear.training.encode_ranks import Encoding, encode_on_ranks

    encode_on_ranks(parse_config(arguments.config), arguments.folder, Encoding(**arguments.encoding), signals)
