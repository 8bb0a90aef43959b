"""How a command ends: exit codes, and errors told in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import typer

from packscore.files.failures import RunError, UsageError


class ExitCode(IntEnum):
    """What the shell gets."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    BAD_RECORDS = 3
    INTERRUPTED = 130


def tell(message: str) -> None:
    """One message to stderr."""
    typer.echo(f"packscore: {message}", err=True)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn what a command raises into its exit code and a line on stderr.

    Raises:
      typer.Exit: instead of every error that a user can do something about.
    """
    # imported here, with the command and not with --help
    from packscore.errors import InputError, InputTypeError, PackscoreError

    try:
        yield
    except KeyboardInterrupt:
        tell("interrupted")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except BrokenPipeError:
        # the reader of our stdout is gone, and flushing it at exit would fail once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(ExitCode.FAILURE) from None
    except (UsageError, InputError, InputTypeError) as error:
        tell(f"error: {error}")
        raise typer.Exit(ExitCode.USAGE) from error
    except (RunError, PackscoreError, OSError) as error:
        tell(f"error: {error}")
        raise typer.Exit(ExitCode.FAILURE) from error
