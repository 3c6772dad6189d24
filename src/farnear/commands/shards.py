"""`farnear shards`: make shards, write queries for them, and see what is in them."""

import argparse

from farnear.command_line import Parser
from farnear.commands.index import add_index
from farnear.commands.ingest import add_ingest
from farnear.commands.queries import add_queries


def add_shards(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `shards` and all below it."""
    parser = commands.add_parser(
        "shards",
        help="make shards of (query, page) pairs, and look into them",
        description="Write pairs of a query and a page image as WebDataset tars, split into training and evaluation; "
        "index shards, show what they hold, and verify every byte of them.",
        epilog="examples:\n"
        "  farnear shards from-csv pairs.csv shards --eval-fraction 0.1\n"
        "  farnear shards inspect 'shards/train-*.tar'",
    )
    sources = parser.add_subparsers(metavar="COMMAND", required=True)
    add_ingest(sources)
    add_queries(sources)
    add_index(sources)
