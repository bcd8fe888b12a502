"""Nothing half-written ever carries a final name: write beside the target, sync, rename."""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from selfrepair.errors import InputError
from selfrepair.storage.processes import is_alive

# Why a file cannot be written -> what to do. Other errors have no remedy that a user could apply.
_REMEDIES = {
    errno.ENOSPC: "free some space there (`df -h`, `make prune`)",
    errno.EDQUOT: "free some space there (`quota`, `make prune`)",
    errno.EROFS: "make it writable, or work in another directory",
    errno.EACCES: "make it writable (`ls -ld` shows whose it is)",
    errno.EPERM: "make it writable (`ls -ld` shows whose it is)",
    errno.EIO: "check the disk or the network file system (`dmesg`)",
}


@contextlib.contextmanager
def replacing(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success sync it and rename it over `target`.

    If the body raises, the temporary file is removed and `target` is left as it was. Raises InputError
    where there is no space or no permission to write.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
        _sync_directory(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # as on a read-only file system
            temporary.unlink(missing_ok=True)
        number = _system_error(error)
        if number not in _REMEDIES:
            raise
        remedy = f"{_REMEDIES[number]}, then run the same command again: what is finished is kept."
        what = f"cannot be written ({os.strerror(number)})"
        raise InputError(what, where=str(target), remedy=remedy) from error


def _system_error(error: BaseException) -> int | None:
    """The number of the system's error; libraries of other languages only put it into their message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    match = re.search(r"\((?:os error|errno) (\d+)\)|\[errno (\d+)\]", str(error), re.IGNORECASE)
    return int(match[1] or match[2]) if match else None


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 `text` to `target`, all or nothing."""
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_leftovers(output: str | os.PathLike[str]) -> None:
    """Remove the temporary files that killed processes of this machine left beside `output`."""
    output = Path(output)
    for path in output.parent.glob(f".{output.name}.*.tmp"):
        pid = path.name.removeprefix(f".{output.name}.").partition("-")[0]
        if not (pid.isdigit() and is_alive(int(pid))):
            path.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    # A rename survives a power cut only once its directory is on disk too. Some file systems refuse to
    # open a directory for syncing; there the rename itself is the best there is.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
