import multiprocessing
import os
from pathlib import Path

import pytest
from selfrepair.errors import InputError
from selfrepair.storage import atomic


def test_the_target_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    with atomic.replacing(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        assert temporary.parent == target.parent  # or the rename would cross file systems
        temporary.write_text("whole")
    assert target.read_text() == "whole"
    assert os.listdir(target.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_after_an_error_the_old_content_stays(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "file.txt"
    atomic.write_text(target, "old")
    with pytest.raises(error), atomic.replacing(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_an_error_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError), atomic.replacing(tmp_path / "file.txt"):
        raise ValueError
    assert os.listdir(tmp_path) == []


def test_a_body_that_writes_nothing_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic.replacing(tmp_path / "file.txt"):
        pass
    assert os.listdir(tmp_path) == []


def test_text_is_utf_8(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "file.txt", "σ ≠ ã")
    assert (tmp_path / "file.txt").read_bytes() == "σ ≠ ã".encode()


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    with atomic.replacing(target) as one, atomic.replacing(target) as two:
        one.write_text("one")
        two.write_text("two")
        assert one != two
    assert target.read_text() == "one"  # the last to finish
    assert os.listdir(tmp_path) == ["file.txt"]


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    ended = multiprocessing.get_context("spawn").Process(target=print)
    ended.start()
    ended.join()
    target = tmp_path / "file.txt"
    dead = tmp_path / f".file.txt.{ended.pid}-0a1b.tmp"
    alive = tmp_path / f".file.txt.{os.getpid()}-0a1b.tmp"
    other = tmp_path / f".other.txt.{ended.pid}-0a1b.tmp"
    for path in (target, dead, alive, other):
        path.touch()
    atomic.remove_leftovers(target)
    assert sorted(os.listdir(tmp_path)) == sorted([target.name, alive.name, other.name])


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "arrow", "rust"],
)
def test_a_full_disk_is_told_with_what_to_do(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / "file.txt"
    with (
        pytest.raises(
            InputError, match=r"file.txt: cannot be written \(No space left on device\)\n.*free some"
        ),
        atomic.replacing(target) as temporary,
    ):
        temporary.write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), atomic.replacing(tmp_path / "file.txt"):
        raise IsADirectoryError(21, "Is a directory")


def test_leftovers_of_a_killed_process_go_even_before_its_parent_has_noted_its_end(tmp_path: Path) -> None:
    dead = multiprocessing.get_context("fork").Process(target=os._exit, args=(9,))
    dead.start()
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # it is over, and stays a zombie
    target = tmp_path / "file.txt"
    for pid in (dead.pid, os.getpid()):
        (tmp_path / f".file.txt.{pid}-abcd.tmp").touch()
    atomic.remove_leftovers(target)
    assert os.listdir(tmp_path) == [f".file.txt.{os.getpid()}-abcd.tmp"]
    dead.join()
