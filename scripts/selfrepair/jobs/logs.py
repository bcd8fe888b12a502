"""Write everything that a job prints and logs to the job's own file, also what C libraries print."""

import contextlib
import os
import sys
from collections.abc import Iterator


def clear(path: str | None) -> None:
    """Create the log, or empty the log of an earlier attempt."""
    if path is not None:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8"):
            pass


def append(path: str | None, text: str) -> None:
    """Append lines to a job's log. Print them if the job has no log or the log cannot be written."""
    if path is not None:
        try:
            with open(path, "a", encoding="utf-8") as log:
                log.write(text.rstrip("\n") + "\n")
            return
        except OSError:  # a full disk must not hide the message that reports it
            pass
    print(text, file=sys.stderr)


@contextlib.contextmanager
def redirected(path: str | None) -> Iterator[None]:
    """Append log records, standard output and standard error to the file `path`, also those of C code.

    The process gets its own standard output and error back afterwards. With None they are not redirected.
    """
    import logging  # not for a job that sends its work to a worker

    logger = logging.getLogger("selfrepair")
    saved = []
    sys.stdout.flush()
    sys.stderr.flush()
    if path is not None:
        saved = [(os.dup(number), number) for number in (1, 2)]
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
    # Not sys.stderr, which tests and notebooks replace by streams that do not write to descriptor 2.
    stream = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - closed below
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        logging.Formatter("%(asctime)s.%(msecs)03d %(levelname)s %(message)s", datefmt="%H:%M:%S")
    )
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)
        for flush in (sys.stdout.flush, sys.stderr.flush, stream.close):
            with contextlib.suppress(OSError):  # a full disk: the job's own error matters more
                flush()
        for copy, number in saved:
            os.dup2(copy, number)
            os.close(copy)
