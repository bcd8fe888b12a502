"""One job, one log file: everything said while the job runs goes there, from whatever process and library."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

LOGGER = logging.getLogger("selfrepair")
FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")


def begin(path: str | None) -> None:
    """Empty the log of an earlier attempt."""
    if path is not None:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8"):
            pass


def append(path: str | None, text: str) -> None:
    """Add lines to a job's log, or print them where it has none or cannot be written."""
    if path is not None:
        try:
            with open(path, "a", encoding="utf-8") as log:
                log.write(text.rstrip("\n") + "\n")
            return
        except OSError:  # a full disk must not swallow the message that says so
            pass
    print(text, file=sys.stderr)


@contextlib.contextmanager
def into(path: str | None) -> Iterator[None]:
    """Send log records and everything printed, by C code too, to the end of the file `path`.

    The process's own standard output and error return afterwards. With None they stay where they are.
    """
    saved = []
    sys.stdout.flush()
    sys.stderr.flush()
    if path is not None:
        saved = [(os.dup(number), number) for number in (1, 2)]
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
    # A stream of its own: sys.stderr may be a test's or a notebook's stand-in, not descriptor 2.
    stream = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - closed below
    handler = logging.StreamHandler(stream)
    handler.setFormatter(FORMAT)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    propagate, LOGGER.propagate = LOGGER.propagate, False
    try:
        yield
    finally:
        LOGGER.propagate = propagate
        LOGGER.removeHandler(handler)
        for flush in (sys.stdout.flush, sys.stderr.flush, stream.close):
            with contextlib.suppress(OSError):  # a full disk; the job's own error is the one to tell
                flush()
        for copy, number in saved:
            os.dup2(copy, number)
            os.close(copy)
