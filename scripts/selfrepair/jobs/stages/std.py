"""Stage `std`: moments of the stored contributions over all data sets of an experiment.

Input: `layers`, the activation files, data set by data set, layer by layer.
Output `std`: safetensors with attn.mean, attn.std, mlp.mean, mlp.std [layers, position, d_model] float32, count int64
[layers]. The population standard deviation is over prompts, position by position and never pooled over positions,
because position 0 may be an attention sink. With positions `last` there is one position. If heads are ablated, also
heads.mean and heads.std: the moments of the output projection's input, all heads side by side.
Params: experiment, model, datasets, layers, code.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from selfrepair.jobs import cellstore
from selfrepair.jobs.job import Job
from selfrepair.jobs.session import Session
from selfrepair.planning.sites import ATTN
from selfrepair.storage import tensors

log = logging.getLogger("selfrepair")


@dataclass
class Moments:
    """Count, mean and summed squared deviations, joined chunk by chunk (Chan, Golub and LeVeque 1983)."""

    count: int
    mean: Tensor  # (position, d_model) float64
    squares: Tensor  # (position, d_model) float64

    @classmethod
    def from_values(cls, values: Tensor) -> "Moments":  # (prompt, position, d_model)
        """Return the moments of one chunk of prompts."""
        values = values.double()
        mean = values.mean(0)
        return cls(len(values), mean, (values - mean).square().sum(0))

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        squares = self.squares + other.squares + shift.square() * (self.count * other.count / count)
        return Moments(count, mean, squares)

    @property
    def std(self) -> Tensor:  # (position, d_model)
        """Return the population standard deviation."""
        return (self.squares / self.count).sqrt()


def run(job: Job, session: Session) -> None:
    """Write the moments. Raises DamagedFileError for an activation file that is not what was written."""
    n_layers, datasets = job.params["layers"], job.params["datasets"]
    files = job.input["layers"]
    assert len(files) == n_layers * len(datasets)
    rows: dict[str, list[Tensor]] = defaultdict(list)
    counts = []
    for layer in range(n_layers):
        layer_moments = moments(files[number * n_layers + layer] for number in range(len(datasets)))
        for component, moment in layer_moments.items():
            rows[f"{component}.mean"].append(moment.mean.float())
            rows[f"{component}.std"].append(moment.std.float())
        counts.append(layer_moments[ATTN].count)
    stacked = {name: _stacked(values) for name, values in rows.items()}
    stacked["count"] = torch.tensor(counts, dtype=torch.int64)
    tensors.write(job.output["std"], stacked, {"config": job.params, "inputs": cellstore.input_digests(job)})
    log.info("moments of %d layers over %s", n_layers, ", ".join(datasets))


def _stacked(layers: list[Tensor]) -> Tensor:  # (position, width) each -> (layer, position, width)
    """Return the layers in one tensor, padded with zeros if the widths of their heads' inputs differ."""
    width = max(values.shape[-1] for values in layers)
    return torch.stack([functional.pad(values, (0, width - values.shape[-1])) for values in layers])


def moments(files: Iterable[str]) -> dict[str, Moments]:
    """Return the joint moments of several activation files, by component."""
    total: dict[str, Moments] = {}
    for file in files:
        stored = tensors.read(file)
        for component in stored.keys() - {"prompt"}:
            values = stored[component]  # (prompt(, position), d_model)
            chunk = Moments.from_values(values.reshape(len(values), -1, values.shape[-1]))
            total[component] = total[component] + chunk if component in total else chunk
    return total
