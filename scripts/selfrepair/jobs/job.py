"""The request to a stage. It is JSON, so that the job's own process and the worker get the same request."""

from typing import Any, NamedTuple

Paths = dict[str, Any]  # name -> path, or list of paths


class Job(NamedTuple):
    """One request to one stage. All values are JSON: strings, numbers, lists, dictionaries, None."""

    stage: str  # a module of selfrepair.jobs.stages
    input: Paths
    output: Paths
    params: dict[str, Any]  # every value that shapes the result
    runtime: dict[str, Any] = {}  # noqa: RUF012 - device, worker and other values that rerun nothing; never modified
    log: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the job as a dictionary that `json.dumps` accepts."""
        return self._asdict()

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Job":
        """Return the job that `to_json` turned into `raw`. Raises TypeError for unknown or missing keys."""
        return cls(**raw)
