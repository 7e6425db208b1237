"""Errors that are the user's to mend, and how a command-line tool reports them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches

_WORKER_PREFIX = "Caught UserError in DataLoader worker"


class UserError(Exception):
    """A mistake in a path, a name, a file or an option: one line naming the thing and the remedy."""

    def __init__(self, message: str = "") -> None:
        # DataLoader re-raises a worker's exception as type(exc)("Caught ... Original Traceback ...");
        # the user needs the line, not the worker's stack.
        if message.startswith(_WORKER_PREFIX):
            message = message.rsplit("UserError: ", 1)[-1]
        super().__init__(" ".join(message.split()))


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``"; did you mean 'HorizontalFlip'?"``, or ``""`` where nothing known is near."""
    by_lower = {str(k).lower(): str(k) for k in known}
    found = get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[found[0]]!r}?" if found else ""


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a tool's ``main`` and exits: 2 with one ``error:`` line on UserError, 130 on Ctrl-C.

    Args:
        main: the tool; its return value (None or an int) is the exit status.
    """
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output, head for example, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status or 0)
