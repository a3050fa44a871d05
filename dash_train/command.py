"""What every command under `launch/` shares: its arguments, its log lines and how it reports a user's mistake."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable

from dash_train.distributed.place import find_place
from dash_train.errors import EXIT_RANK_LOST, EXIT_USER_ERROR, RankError, UserError

logger = logging.getLogger(__name__)


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every command takes: --debug, and the --local_rank that the DeepSpeed launcher puts first."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def recipe_parser(description: str | None) -> argparse.ArgumentParser:
    """A command's parser with `recipe.yaml [key.sub=value ...]`."""
    parser = command_parser(description)
    parser.add_argument("recipe", help="a recipe (YAML); docs/recipe.md lists every key")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that replace the recipe's")
    return parser


def run_command(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse the command line and run `main`; a user's mistake becomes one line on stderr and exit code 2, a lost
    rank one line and exit code 3."""
    args = parser.parse_args()
    try:
        rank, ranks, _ = find_place()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    console = logging.StreamHandler()
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)  # a run keeps every rank's log in files
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[console])
    try:
        main(args)
    except (UserError, OSError) as error:
        if args.debug:
            traceback.print_exc()
        print(f"{'' if rank == 0 else f'[rank {rank}] '}error: {_one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except RankError as error:
        logger.error("[rank %d] error: %s", rank, _one_line(error))
        sys.stdout.flush()
        os._exit(EXIT_RANK_LOST)  # a clean exit would wait for the lost rank
    except Exception as error:
        from dash_train.distributed.world import from_a_collective  # torch, which takes a while to import

        if ranks > 1 and from_a_collective(error) and not args.debug:
            logger.error("[rank %d] error: another rank has ended (%s)", rank, _one_line(error).split(". ")[0])
            os._exit(EXIT_RANK_LOST)
        logger.exception("[rank %d] failed", rank)
        sys.exit(1)
    if ranks > 1:
        _leave_together()


def _leave_together() -> None:
    """End this rank once all have come to the end, without taking the interpreter down piece by piece.

    While it goes down, gloo's threads now and then abort a process whose work is done and saved (one in twenty runs of
    two ranks, torch 2.13), and the launcher then calls the whole run failed.
    """
    from torch import distributed as dist

    if dist.is_initialized():
        dist.barrier()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
