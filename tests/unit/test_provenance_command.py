"""The command that `make provenance` prints makes the file again: with the configuration of the run that made it."""

import base64
import json
import os
from pathlib import Path

import pytest
from selfrepair.tools import lineage

FILE = Path("results/e/m/clean/a.parquet")


def described(root: Path, config_files: list[str], command: str = "snakemake --cores 1") -> list[str]:
    metadata = root / ".snakemake" / "metadata"
    metadata.mkdir(parents=True)
    record = {"starttime": 1_700_000_000.0, "endtime": 1_700_000_060.0, "rule": "effects", "log": []}
    (metadata / base64.b64encode(FILE.as_posix().encode()).decode()).write_text(json.dumps(record))
    log = root / ".snakemake" / "log" / "2020-01-01T000000.000000.snakemake.log"
    log.parent.mkdir()
    log.write_text(f"  Command: {command}\n  Config file(s): {config_files}\n")
    os.utime(log, (1_700_000_100, 1_700_000_100))
    return list(lineage._run(FILE, lineage._record(FILE, root), root))


@pytest.mark.parametrize(
    ("config_files", "expected"),
    [
        (["config.yaml"], "snakemake --cores all -- results/e/m/clean/a.parquet"),
        (["my run.yaml"], "snakemake --configfile 'my run.yaml' --cores all -- results/e/m/clean/a.parquet"),
        (
            ["a.yaml", "b.yaml"],
            "snakemake --configfile a.yaml b.yaml --cores all -- results/e/m/clean/a.parquet",
        ),
    ],
)
def test_the_command_names_the_configuration(tmp_path: Path, config_files: list[str], expected: str) -> None:
    assert described(tmp_path, config_files)[0] == f"  made again by    {expected}"


def test_replaced_values_are_mentioned(tmp_path: Path) -> None:
    lines = described(tmp_path, ["config.yaml"], "snakemake --config runtime={worker: off} --cores 1")
    assert "  note             the run replaced values with --config: repeat them" in lines
