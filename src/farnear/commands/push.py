"""`farnear push`: an export to the hub, when it is asked for."""

import argparse
from pathlib import Path

from farnear.command_line import Parser
from farnear.wording import amount, counted


def add_push(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "push",
        help="publish an export on the hub",
        description="Send an export, or that of a run, to the Hugging Face hub, with its card. Its licence must be "
        "known, and the folder hold nothing but the export. Nothing is ever sent but by this command. One that breaks "
        "off can be repeated.",
        epilog="examples:\n"
        "  farnear push runs/mine --repo-id NAME/REPO --dry-run\n"
        "  farnear push runs/mine --repo-id NAME/REPO --private",
    )
    parser.add_argument("path", metavar="EXPORT_OR_RUN", type=Path, help="an export, or a run that has one")
    parser.add_argument("--repo-id", metavar="NAME/REPO", required=True, help="where to, made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a private repository; refuse a public one")
    parser.add_argument("--revision", metavar="BRANCH", help="a branch, made if it is not there (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request in place of a commit")
    parser.add_argument("--dry-run", action="store_true", help="say what would be sent, and send nothing")
    parser.set_defaults(command=_push)


def _push(arguments: argparse.Namespace) -> int:
    from farnear.model.push import parcel_of, push, refuse_unless_possible

    refuse_unless_possible(arguments.repo_id, arguments.revision, create_pr=arguments.create_pr)
    parcel = parcel_of(arguments.path)
    width = max(map(len, parcel.files))
    for name, size in parcel.files.items():
        print(f"  {name:<{width}}  {amount(size)}")
    where = arguments.repo_id + (f", branch {arguments.revision}" if arguments.revision else "")
    how = "as a pull request to" if arguments.create_pr else "to"
    print(
        f"{counted(len(parcel.files), 'file')}, {amount(sum(parcel.files.values()))}, licence {parcel.license}, {how} "
        f"{where}{', a private repository' if arguments.private else ''}"
    )
    if arguments.dry_run:
        print("nothing was sent")
        return 0
    print(
        push(
            parcel,
            arguments.repo_id,
            private=arguments.private,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
        )
    )
    return 0
