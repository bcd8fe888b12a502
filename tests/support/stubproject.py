"""A copy of the workflow whose stages only pretend: everything around the arithmetic, in milliseconds.

Rules, scripts, configuration, worker and cell store are the product's own; the modules of `selfrepair.jobs.stages`
and `selfrepair.jobs.session` are replaced by the stand-ins below. They write small but genuine tables and do what
`behave.json` in the working directory says (see STAGE).
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[2]

SESSION = '''
"""A session that notes when it is made."""
import os


class Session:
    def __init__(self, device, number=1):
        self.device = device
        self.jobs = 0
        with open("sessions.txt", "a") as file:
            file.write(f"{os.getpid()} {device}\\n")
'''

STAGE = '''
"""A stand-in stage."""
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from selfrepair.storage import tables
from selfrepair.storage.atomic import replacing
from selfrepair.errors import InputError

FACTOR = 1


def run(job, session):
    behaviour = Path("behave.json")
    how = json.loads(behaviour.read_text()) if behaviour.exists() else {}
    outputs = [p for v in job.output.values() for p in ([v] if isinstance(v, str) else v)]
    me = json.dumps(job.params, sort_keys=True)
    wanted = {what: value for what, (where, value) in how.items() if where in me}
    logging.getLogger("selfrepair").info("said by %s", me)
    print("printed by the stage")
    with open("ran.txt", "a") as file:
        file.write(json.dumps([job.stage, os.getpid(), outputs, os.environ["OMP_NUM_THREADS"]]) + "\\n")
    if "fill" in wanted and not Path("results/filler").exists():  # all of the disk but so many bytes
        disk = os.statvfs("results")
        Path("results/filler").write_bytes(bytes(disk.f_bavail * disk.f_frsize - wanted["fill"]))
    if "sleep" in wanted:
        Path("sleeping").touch()
        time.sleep(wanted["sleep"])
    if "input error" in wanted:
        raise InputError(wanted["input error"], where="the data", remedy="mend it.")
    if "error" in wanted:
        raise ZeroDivisionError(wanted["error"])
    if "die" in wanted:
        left = Path("deaths.txt")
        deaths = int(left.read_text()) if left.exists() else 0
        if deaths < wanted["die"]:
            left.write_text(str(deaths + 1))
            os.kill(os.getpid(), signal.SIGKILL)
    content = wanted.get("content", "")
    for output in outputs:
        if output.endswith(".parquet"):
            facts = {"params": job.params, "cell_key": job.runtime.get("cell_key")}
            tables.write(output, {"x": [FACTOR], "content": [content]}, None, facts)
        elif output.endswith(".safetensors"):
            header = json.dumps({"__metadata__": {"content_sha256": me + content}}).encode()
            with replacing(output) as temporary:
                temporary.write_bytes(len(header).to_bytes(8, "little") + header)
        else:
            with replacing(output) as temporary:
                temporary.write_text(me)
'''

STAGES = ("tokens", "activations", "std", "effects", "manifest", "summary", "figures", "report", "crossmodel")

CONFIG: dict[str, Any] = {
    "models": {"m": {"path": "model", "device": "cpu"}},
    "datasets": {"a": {"path": "a.jsonl"}, "b": {"path": "b.jsonl"}},
    "experiments": {
        "e": {
            "models": ["m"],
            "datasets": ["a", "b"],
            "samples": 2,
            "store": 2,
            "draws": 2,
            "ablations": ["zero", "random"],
        }
    },
    "runtime": {"idle_seconds": 20},
}


def copy_workflow(directory: Path) -> None:
    """The files that make a run: Snakefile, rules, scripts and package."""
    shutil.copy(ROOT / "Snakefile", directory)
    for part in ("workflow/rules", "workflow/schemas", "scripts", "envs", "profiles", "workflow/report"):
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, directory / part)  # with byte code, which is valid for the copies
    shutil.copy(ROOT / "workflow" / "Snakefile", directory / "workflow")
    use_plain_log(directory)


def use_plain_log(directory: Path) -> None:
    """Let the profiles of a copy print Snakemake's own log, which `planned` reads."""
    for profile in directory.glob("profiles/*/config.yaml"):
        lines = profile.read_text().splitlines(keepends=True)
        profile.write_text("".join(line for line in lines if not line.startswith("logger:")))


def write_model(directory: Path, layers: int = 2) -> None:
    """Files that look like a model to whoever does not load it."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": layers}))
    (directory / "tokenizer.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1")


class Project:
    """A directory in which the workflow runs."""

    def __init__(self, path: Path, config: dict[str, Any] = CONFIG) -> None:
        self.path = path
        # Not in `path`, which pytest makes too long for a socket's address.
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="run-"))
        self.extra_environment: dict[str, str] = {}
        self.configure(config)

    @classmethod
    def stub(cls, path: Path, config: dict[str, Any] = CONFIG, layers: int = 2) -> "Project":
        """A project with stand-in stages, a model of `layers` layers and data sets a and b."""
        copy_workflow(path)
        package = path / "scripts" / "selfrepair"
        (package / "jobs" / "session.py").write_text(SESSION)
        for module in (package / "jobs" / "stages").glob("*.py"):
            if module.name != "__init__.py":
                module.unlink()
        for stage in STAGES:
            (package / "jobs" / "stages" / f"{stage}.py").write_text(STAGE)
        write_model(path / "model", layers)
        for name in "ab":
            texts = [json.dumps({"text": f"{name} {number}"}) + "\n" for number in range(8)]
            (path / f"{name}.jsonl").write_text("".join(texts))
        return cls(path, config)

    def configure(self, config: dict[str, Any]) -> None:
        """Write config.yaml."""
        (self.path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def configured(self) -> dict[str, Any]:
        """What config.yaml says."""
        return yaml.safe_load((self.path / "config.yaml").read_text())

    def workers(self) -> list[psutil.Process]:
        """The live workers of this project."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = process.info["cmdline"] or []
            if "selfrepair.jobs.worker.server" in words and str(self.runtime_dir) in words[-1]:
                found += [process] if process.info["status"] != psutil.STATUS_ZOMBIE else []
        return found

    def close(self) -> None:
        """End what still runs."""
        for worker in self.workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        shutil.rmtree(self.runtime_dir)

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a user with a private directory for sockets."""
        dropped = {"OMP_NUM_THREADS", "SLURM_JOB_ID", "PYTHONPATH", "SNAKEMAKE_PROFILE", "SELFREPAIR_RUN"}
        dropped.add("PYTHONDONTWRITEBYTECODE")  # else every process of a project compiles the package again
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        kept |= {"XDG_RUNTIME_DIR": str(self.runtime_dir), "HF_HUB_OFFLINE": "1"}
        return {**kept, **self.extra_environment, **more}

    def command(self, *arguments: str) -> list[str]:
        """Snakemake with this interpreter."""
        return [sys.executable, "-m", "snakemake", "--cores", "1", *arguments]

    patience = 600.0  # seconds for one call of Snakemake

    def snakemake(self, *arguments: str, status: int | None = 0) -> str:
        """Run Snakemake; return what it said. Fails if it ends with another status than `status`."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.path,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=self.patience,
        )
        assert status is None or done.returncode == status, done.stdout
        return done.stdout

    def planned(self, *arguments: str) -> dict[str, list[str]]:
        """What a dry run would do: rule -> first output of each job, below results/."""
        said = self.snakemake("-n", *arguments)
        found: dict[str, list[str]] = {}
        for rule, body in re.findall(r"^(?:local)?rule (\S+):\n((?:    .*\n)+)", said, re.M):
            if rule != "all":
                output = re.search(r"output: ([^,\n]+)", body)
                assert output is not None, body
                found.setdefault(rule, []).append(output.group(1).removeprefix("results/"))
        assert found or "Nothing to be done" in said, said
        return {rule: sorted(outputs) for rule, outputs in found.items()}

    def behave(self, **how: tuple[str, Any]) -> None:
        """Make jobs whose params contain a text behave: `error=(text, message)`, `sleep=(text, 1)`..."""
        behaviour = {what.replace("_", " "): value for what, value in how.items()}
        (self.path / "behave.json").write_text(json.dumps(behaviour))

    def ran(self) -> list[list[Any]]:
        """[stage, process, outputs, threads] of every stage run so far."""
        file = self.path / "ran.txt"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def edit(self, module: str, old: str, new: str) -> None:
        """Change the text of a module of the package."""
        path = self.path / "scripts" / "selfrepair" / f"{module}.py"
        text = path.read_text()
        assert old in text
        later = max(time.time(), path.stat().st_mtime + 1)
        path.write_text(text.replace(old, new, 1))
        os.utime(path, (later, later))  # Python takes byte code of the same size and second for current
