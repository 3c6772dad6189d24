"""`farnear shards queries`: pages without queries become requests to a vision model, and its answers pairs."""

import argparse
import os
from pathlib import Path

from farnear.command_line import Parser, positive
from farnear.commands.ingest import add_eval_fraction, add_out, tell_import
from farnear.errors import RunStoppedError, UserError
from farnear.wording import counted

ANSWERS_PER_LINE = 100  # of output


def add_queries(sources: "argparse._SubParsersAction[Parser]") -> None:
    parser = sources.add_parser(
        "queries",
        help="have a vision model write queries for pages that have none",
        description="Three steps: export makes request files of the pages in corpus shards, run sends them to a server "
        "(or upload them as a batch), import makes pairs of the answers.",
        epilog="example:\n"
        "  farnear shards queries export data/corpus-*.tar --model Qwen/Qwen3-VL-8B-Instruct\n"
        "  farnear shards queries run requests-*.jsonl --endpoint http://localhost:8000/v1\n"
        "  farnear shards queries import data/corpus-*.tar answers.jsonl shards",
    )
    steps = parser.add_subparsers(metavar="STEP", required=True)
    _add_queries_export(steps)
    _add_queries_run(steps)
    _add_queries_import(steps)


def _add_queries_export(steps: "argparse._SubParsersAction[Parser]") -> None:
    parser = steps.add_parser(
        "export",
        help="pages to request files",
        description="Write a request for each page of corpus shards, in the lines of OpenAI's batch API: "
        "requests-00000.jsonl and so on, each below --max-bytes.",
        epilog="example:\n"
        "  farnear shards queries export data/corpus-*.tar --model Qwen/Qwen3-VL-8B-Instruct \\\n"
        '    --max-side 1280 --extra-body \'{"temperature": 0.7, "max_tokens": 500}\'',
    )
    parser.add_argument("shards", metavar="PAGES.tar", nargs="+", type=Path, help="shards of pages")
    parser.add_argument("--model", required=True, help="what the server calls its model")
    parser.add_argument(
        "--out", type=Path, default=Path("requests.jsonl"), help="names the request files (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt", type=Path, help="a text in which {n} stands for the number of queries (default: farnear's own)"
    )
    parser.add_argument(
        "--queries-per-page", metavar="N", type=positive, default=3, help="what {n} becomes (default: %(default)s)"
    )
    parser.add_argument(
        "--max-side", metavar="PIXELS", type=positive, help="send longer pages smaller, as JPEG (default: as they are)"
    )
    parser.add_argument(
        "--max-bytes", type=positive, default=100_000_000, help="of a request file (default: %(default)s)"
    )
    parser.add_argument(
        "--response-format",
        choices=("none", "json_object", "json_schema"),
        default="none",
        help="have the server keep the model to JSON, if it can (default: %(default)s)",
    )
    parser.add_argument("--extra-body", metavar="JSON", help="more parameters of each request")
    parser.set_defaults(command=_queries_export)


def _queries_export(arguments: argparse.Namespace) -> int:
    from farnear.ingest.query_requests import DEFAULT_PROMPT, export_requests

    files, requests = export_requests(
        arguments.shards,
        arguments.out,
        model=arguments.model,
        prompt=arguments.prompt or DEFAULT_PROMPT,
        queries_per_page=arguments.queries_per_page,
        max_side=arguments.max_side,
        max_bytes=arguments.max_bytes,
        response_format=arguments.response_format,
        extra_body=arguments.extra_body,
    )
    print(f"{counted(requests, 'request')} in {counted(len(files), 'file')}:")
    for path in files:
        print(path)
    return 0


def _add_queries_run(steps: "argparse._SubParsersAction[Parser]") -> None:
    parser = steps.add_parser(
        "run",
        help="request files to answers",
        description="Send requests to any server that speaks OpenAI's chat completions, and append its answers to one "
        "file. Requests that have an answer there are not sent again, so a run that ended early is started again with "
        "the same words. A request that fails for good is named, and the exit code is then 1.",
        epilog="example:\n  farnear shards queries run requests-*.jsonl --endpoint http://localhost:8000/v1",
    )
    parser.add_argument("files", metavar="REQUESTS.jsonl", nargs="+", type=Path, help="what export wrote")
    parser.add_argument("--endpoint", required=True, help="the server's address up to /v1")
    parser.add_argument(
        "--answers", type=Path, default=Path("answers.jsonl"), help="the file of answers (default: %(default)s)"
    )
    parser.add_argument("--api-key-env", metavar="NAME", help="the environment variable that holds the key")
    parser.add_argument("--concurrency", type=positive, default=8, help="requests at once (default: %(default)s)")
    parser.add_argument("--attempts", type=positive, default=6, help="tries of a request (default: %(default)s)")
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=positive, default=600, help="for an answer (default: %(default)s)"
    )
    parser.set_defaults(command=_queries_run)


def _queries_run(arguments: argparse.Namespace) -> int:
    from farnear.ingest.query_sending import Server, send_requests

    key = None
    if arguments.api_key_env is not None:
        key = os.environ.get(arguments.api_key_env)
        if not key:
            raise UserError(
                f"the environment variable {arguments.api_key_env} is empty, so there is no key to send; export it"
            )
    server = Server(arguments.endpoint, key, attempts=arguments.attempts, timeout=arguments.timeout)
    answered, answered_before, failures = 0, 0, 0
    for outcome in send_requests(arguments.files, arguments.answers, server, concurrency=arguments.concurrency):
        if outcome.by_earlier_run:
            answered_before += 1
        elif outcome.failure is None:
            answered += 1
            if answered % ANSWERS_PER_LINE == 0:
                print(f"{answered} answered", flush=True)
        else:
            failures += 1
            print(f"{outcome.custom_id} failed: {outcome.failure}", flush=True)
    before = f" ({answered_before} by an earlier run)" if answered_before else ""
    print(f"{answered + answered_before} answered{before}, {failures} failed, in {arguments.answers}")
    if failures:
        raise RunStoppedError(
            f"{counted(failures, 'request')} without an answer; the reasons stand above; run again to send once more"
        )
    return 0


def _add_queries_import(steps: "argparse._SubParsersAction[Parser]") -> None:
    parser = steps.add_parser(
        "import",
        help="answers to pairs",
        description="Write each page with the queries that a model wrote for it. Queries that are empty, written twice "
        "or copied from the page's text are dropped and counted. No document is on both sides of the split.",
        epilog="example:\n  farnear shards queries import data/corpus-*.tar answers.jsonl shards",
    )
    parser.add_argument(
        "files", metavar="FILE", nargs="+", type=Path, help="the shards of pages, .tar, and the answers, .jsonl"
    )
    add_out(parser)
    add_eval_fraction(parser, 0.1)
    parser.add_argument(
        "--texts", metavar="FILE", type=Path, help="a .csv or .jsonl with page (SHARD.tar/KEY) and its text"
    )
    parser.set_defaults(command=_queries_import)


def _queries_import(arguments: argparse.Namespace) -> int:
    from farnear.ingest.query_answers import import_answers

    shards = [path for path in arguments.files if path.suffix == ".tar"]
    answers = [path for path in arguments.files if path.suffix == ".jsonl"]
    for path in arguments.files:
        if path.suffix not in (".tar", ".jsonl"):
            raise UserError(f"{path} is neither a shard of pages (.tar) nor a file of answers (.jsonl); leave it out")
    if not shards or not answers:
        raise UserError("queries import needs shards of pages (.tar), answers (.jsonl), and then the folder to write")
    report = import_answers(
        shards,
        answers,
        arguments.out,
        texts=arguments.texts,
        eval_fraction=arguments.eval_fraction,
        seed=arguments.seed,
        pairs_per_shard=arguments.pairs_per_shard,
    )
    return tell_import(report)
