"""What a stage is asked to do: the same JSON whether it runs in the job's own process or in the worker."""

from dataclasses import asdict, dataclass, field
from typing import Any

Paths = dict[str, Any]  # name -> path, or list of paths


@dataclass(frozen=True)
class Job:
    """One request to one stage. Everything in it is JSON: strings, numbers, lists, dictionaries, None."""

    stage: str  # a module of selfrepair.jobs.stages
    input: Paths
    output: Paths
    params: dict[str, Any]  # everything that shapes the result
    runtime: dict[str, Any] = field(default_factory=dict)  # everything that does not (device, rows, worker)
    log: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The job as JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Job":
        """The inverse of `to_json`."""
        return cls(**raw)
