"""Leases of devices. No GPU is needed: CPU workers with addresses of their own stand for devices."""

import copy
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import pytest
from bench import Bench
from selfrepair.errors import InputError
from selfrepair.jobs import devices
from selfrepair.jobs.devices import Device
from selfrepair.jobs.job import Job
from selfrepair.jobs.worker import address
from selfrepair.planning import startup
from stubproject import CONFIG, Project

HOLDER = """
import json, sys
from pathlib import Path
from selfrepair.jobs.devices import leased
from selfrepair.jobs.job import Job
model, source, directory, devices = sys.argv[1:]
runtime = {"device": "auto", "devices": int(devices), "model": model}
with leased(Job("effects", {}, {}, {"experiment": "e", "source": source}, runtime), Path(directory)) as lease:
    print(lease.device.visible, flush=True)
    sys.stdin.read()
"""


class Holder:
    """A process that leases a device until it is released or killed."""

    def __init__(
        self, directory: Path, model: str = "m", source: str = "a", number: int = 2, at_once: int = 1
    ) -> None:
        environment = {**os.environ, devices.PRETEND: str(number), "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, model, source, str(directory), str(at_once)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def device(self) -> str:
        """The leased device; waits for the lease."""
        assert self.process.stdout is not None and not self.waits(60)
        return self.process.stdout.readline().strip()

    def waits(self, seconds: float = 0.5) -> bool:
        """Whether there is no lease within some time."""
        return not select.select([self.process.stdout], [], [], seconds)[0]

    def release(self) -> None:
        self.process.communicate()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class Workflow:
    """The part of Snakemake's workflow that knows how many jobs may run."""

    def __init__(self, cores: int, local_exec: bool) -> None:
        self.cores, self.local_exec = cores, local_exec
        self.global_resources: dict[str, Any] = {}
        self.scheduler = SimpleNamespace(global_resources={})

    def register_resource(self, name: str, value: int) -> None:
        """As Snakemake keeps it."""
        self.global_resources[name] = SimpleNamespace(value=value)


def used(directory: Path, *holders: tuple[str, str]) -> list[str]:
    """Devices that jobs with these models and sources get one after the other."""
    found = []
    for model, source in holders:
        holder = Holder(directory, model, source)
        found.append(holder.device())
        holder.release()
    return found


def test_no_device_is_leased_twice_and_an_ended_or_killed_job_frees_its_device(tmp_path: Path) -> None:
    first, second = Holder(tmp_path), Holder(tmp_path)
    holding = {holder.device(): holder for holder in (first, second)}
    assert sorted(holding) == ["pretended-0", "pretended-1"]
    third = Holder(tmp_path)
    assert third.waits()
    holding["pretended-1"].kill()
    assert third.device() == "pretended-1"
    fourth = Holder(tmp_path)
    assert fourth.waits()
    holding["pretended-0"].release()
    assert fourth.device() == "pretended-0"
    for holder in (third, fourth):
        holder.release()


def test_jobs_prefer_the_device_with_their_model_and_source(tmp_path: Path) -> None:
    first = used(tmp_path, ("m", "a"), ("n", "a"), ("m", "a"), ("n", "a"), ("m", "b"), ("n", "b"))
    assert first == ["pretended-0", "pretended-1"] * 3  # each model has its device
    busy = Holder(tmp_path, "m", "b")
    assert busy.device() == "pretended-0"
    assert used(tmp_path, ("m", "b")) == ["pretended-1"]  # a free device is better than none
    busy.release()


def test_a_large_model_leases_its_devices_together(tmp_path: Path) -> None:
    pairs = [Holder(tmp_path, "large", number=5, at_once=2) for _ in range(2)]
    holding = {holder.device(): holder for holder in pairs}
    assert sorted(holding) == ["pretended-0,pretended-1", "pretended-2,pretended-3"]
    third, small = Holder(tmp_path, "large", number=5, at_once=2), Holder(tmp_path, "small", number=5)
    assert small.device() == "pretended-4" and third.waits(0.2)  # the fifth is no pair
    other = Holder(tmp_path, "small", number=5)
    assert other.waits(0.2)
    holding["pretended-2,pretended-3"].kill()
    assert third.device() == "pretended-2,pretended-3"  # the set that holds its model
    holding["pretended-0,pretended-1"].release()
    small.release()
    assert other.device() == "pretended-4"
    for holder in (third, other):
        holder.release()


def test_devices_that_are_free_together_are_preferred_to_waiting(tmp_path: Path) -> None:
    several = [Holder(tmp_path, "m", number=4) for _ in range(3)]
    names = {holder.device(): holder for holder in several}
    assert sorted(names) == ["pretended-0", "pretended-1", "pretended-2"]
    names["pretended-0"].release()
    names["pretended-2"].release()
    time.sleep(2.5)  # longer than a device is kept for jobs of the model that it was used for
    large = Holder(tmp_path, "large", number=4, at_once=2)
    assert large.device() == "pretended-2,pretended-3"
    for holder in (names["pretended-1"], large):
        holder.release()


def test_a_lease_survives_the_removal_of_stale_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.PRETEND, "1")
    runtime = {"device": "auto", "devices": 1, "model": "m"}
    with devices.leased(Job("effects", {}, {}, {"experiment": "e", "source": "a"}, runtime), tmp_path):
        (path,) = tmp_path.glob("device-*.lease")
        os.utime(path, (0, 0))  # leased long ago
        address.remove_stale_files(tmp_path)
        other = Holder(tmp_path, number=1)
        assert path.exists() and other.waits()
    assert other.device() == "pretended-0"
    other.release()


def test_a_lock_of_a_removed_file_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, lock = tmp_path / "x.lease", devices.fcntl.lockf

    def removed_first(*arguments: Any) -> None:
        path.unlink()
        lock(*arguments)

    monkeypatch.setattr(devices.fcntl, "lockf", removed_first)
    assert devices.try_lock(path) is None


def test_jobs_with_one_two_and_four_devices_do_not_deadlock(tmp_path: Path) -> None:
    """Each holds its devices for a moment; all are done, and no device was held twice."""
    log = tmp_path / "log"
    code = HOLDER.replace(
        "    print(lease.device.visible, flush=True)\n    sys.stdin.read()\n",
        "    import os, time\n"
        "    def note(what):\n"
        "        with open(os.environ['LOG'], 'a') as log:\n"
        "            log.write(f'{what} {lease.device.visible}\\n')\n"
        "    note('+')\n    time.sleep(0.05)\n    note('-')\n",
    )
    assert "note('-')" in code
    environment = {
        **os.environ,
        devices.PRETEND: "4",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "LOG": str(log),
    }
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, "m", "a", str(tmp_path), at_once], env=environment)
        for at_once in "124" * 2
    ]
    assert [job.wait(timeout=60) for job in jobs] == [0] * 6
    held: set[str] = set()
    for line in log.read_text().splitlines():
        what, _, names = line.partition(" ")
        for name in names.split(","):
            assert (name in held) == (what == "-")
            (held.add if what == "+" else held.remove)(name)
    assert not held


def test_too_few_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.PRETEND, "2")
    assert devices._groups({"device": "auto", "devices": 2}) == [
        [Device("cpu", "pretended-0"), Device("cpu", "pretended-1")]
    ]
    with pytest.raises(InputError, match="3 CUDA devices are needed, and 2 are visible"):
        devices._groups({"device": "auto", "devices": 3})


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(devices, "_torch_has_cuda", lambda: True)
    monkeypatch.delenv(devices.PRETEND, raising=False)
    return monkeypatch


def test_auto_is_every_visible_device(with_cuda: pytest.MonkeyPatch) -> None:
    with_cuda.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5ab")
    assert devices.available("auto") == [Device("auto", "2"), Device("auto", "GPU-5ab")]
    assert devices.available("cuda:1") == [Device("cuda:1", "2,GPU-5ab")]  # as configured
    for one in ("3", ""):
        with_cuda.setenv("CUDA_VISIBLE_DEVICES", one)
        assert devices.available("auto") == [Device("auto", one)]
    with_cuda.delenv("CUDA_VISIBLE_DEVICES")
    with_cuda.setattr(
        devices.os, "listdir", lambda _: ["null", "nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"]
    )
    assert devices.available("auto") == [Device("auto", "0"), Device("auto", "1")]
    with_cuda.setattr(devices, "_torch_has_cuda", lambda: False)
    assert devices.available("auto") == [Device("auto", None)]


def test_a_build_of_pytorch_for_cpus_is_recognised() -> None:
    import torch

    assert devices._torch_has_cuda() == (torch.version.cuda is not None)


def test_a_process_sees_its_device_only() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "0,1"}
    Device("auto", "1").apply(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "1"}
    Device("cpu", None).apply(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "1"}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench.stub(tmp_path)
    assert isinstance(bench, Bench)
    yield bench
    bench.close()


def test_each_device_has_its_worker_and_a_killed_worker_keeps_none(bench: Bench) -> None:
    pretend = {devices.PRETEND: "2"}
    bench.behave(sleep=("slow", 60))
    slow = bench.start(bench.job("slow", device="auto"), **pretend)
    faults.wait((bench.path / "sleeping").exists, 20)
    quick = bench.start(bench.job("quick", device="auto"), **pretend)
    assert quick.wait(timeout=60) == 0  # beside the busy device
    assert len(bench.workers()) == 2
    (busy,) = [process for _, process, outputs, _ in bench.ran() if "slow" in outputs[0]]
    bench.behave()
    os.kill(busy, 9)
    assert slow.wait(timeout=60) == 0  # by another worker on its device
    assert "died while it did this job; starting another one" in bench.log("slow")
    (bench.path / "sleeping").unlink()
    bench.behave(sleep=("slow", 60))
    slow = bench.start(bench.job("slow-2", device="auto"), **pretend)
    faults.wait((bench.path / "sleeping").exists, 20)
    bench.behave()
    slow.kill()
    slow.wait()
    jobs = [bench.start(bench.job(f"after-{number}", device="auto"), **pretend) for number in range(4)]
    assert [job.wait(timeout=60) for job in jobs] == [0] * 4


def test_a_worker_gives_way_to_one_whose_devices_are_among_its_own(bench: Bench) -> None:
    """The memory of a device holds one model: whoever starts there dismisses the idle workers."""
    pretend = {devices.PRETEND: "2"}
    assert bench.start(bench.job("small", device="auto"), **pretend).wait(timeout=60) == 0
    (small,) = bench.workers()
    assert bench.start(bench.job("large", device="auto", devices=2), **pretend).wait(timeout=60) == 0
    assert bench.start(bench.job("large-2", device="auto", devices=2), **pretend).wait(timeout=60) == 0
    faults.wait(lambda: len(bench.workers()) == 1, 20)
    (large,) = bench.workers()
    assert large != small
    assert bench.start(bench.job("small-2", device="auto"), **pretend).wait(timeout=60) == 0
    faults.wait(lambda: large not in bench.workers(), 20)


def test_a_run_on_several_devices_uses_all_and_gives_the_results_of_one(tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIG)
    config["models"]["m"]["device"] = "auto"
    config["experiments"]["e"].update(datasets=["a"], ablations=["zero"])
    projects, sets = {}, {}
    for number in (1, 3):
        (tmp_path / str(number)).mkdir()
        project = projects[number] = Project.stub(tmp_path / str(number), config, layers=4)
        project.extra_environment = {devices.PRETEND: str(number)}
        project.behave(sleep=('"ablation": ', 0.2))
        project.snakemake(
            "--cores", "4", "--until", "effects"
        )  # without `gpu=N`: enough jobs for all devices
        sets[number] = {process for stage, process, _, _ in project.ran() if stage == "effects"}
    assert len(sets[1]) == 1 and len(sets[3]) == 3
    assert faults.contents(projects[1]) == faults.contents(projects[3])
    assert len(list(projects[1].path.glob("results/e/m/effects/*/*/*"))) == 8
    for project in projects.values():
        project.close()


def test_the_jobs_at_a_time_follow_the_visible_devices() -> None:
    def started(
        visible: int, cores: int = 64, local: bool = True, **given: int
    ) -> tuple[int | None, str | None]:
        workflow = Workflow(cores=cores, local_exec=local)
        for name, value in given.items():
            workflow.register_resource(name, value)
        warning = startup.set_jobs_at_a_time(workflow, visible)
        assert workflow.scheduler.global_resources.keys() == ({"gpu"} if local and not given else set())
        jobs = workflow.global_resources.get("gpu")
        return jobs and jobs.value, warning

    assert started(0) == started(2) == (4, None)
    assert started(8) == (16, None)
    assert started(8, gpu=8) == (8, None)
    assert started(8, local=False) == (None, None) and started(8, local=False, gpu=1) == (1, None)
    jobs, warning = started(8, gpu=4)
    assert jobs == 4 and warning is not None and "8 devices" in warning and "gpu=16" in warning
    jobs, warning = started(8, cores=2)
    assert jobs == 16 and warning is not None and "`--cores 2`" in warning and "`--cores 16`" in warning


def test_a_device_waits_a_moment_for_jobs_of_its_model(tmp_path: Path) -> None:
    """Otherwise two models would take turns on one device, and each turn would load a model."""
    path = tmp_path / "device-0.lease"
    assert devices._rank(path, ["m", ["e", "a"]]) == (2, True)  # never used
    path.write_text(json.dumps(["m", ["e", "a"]]))
    ready = {}
    for seconds in (0.0, 1.0, 10.0):
        os.utime(path, (time.time() - seconds,) * 2)
        for use in (["m", ["e", "a"]], ["m", ["e", "b"]], ["n", ["e", "a"]]):
            ready[seconds, use[0], use[1][1]] = devices._rank(path, use)
    assert [ready[seconds, "m", "a"] for seconds in (0.0, 1.0, 10.0)] == [(0, True)] * 3
    assert [ready[seconds, "m", "b"] for seconds in (1.0, 10.0)] == [(1, True)] * 2
    assert [ready[seconds, "n", "a"] for seconds in (0.0, 1.0, 10.0)] == [(3, False), (3, False), (3, True)]


def test_tokens_go_before_the_model_is_loaded() -> None:
    runtime = {"model": "m", "device": "auto"}
    tokens = [Job("tokens", {}, {}, {"dataset": name}, runtime) for name in "ab"]
    clean = Job("activations", {}, {}, {"dataset": "a", "experiment": "e"}, runtime)
    assert devices._use(tokens[0]) == devices._use(tokens[1]) != devices._use(clean)
