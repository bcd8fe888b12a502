"""Memory is bounded by the size of a chunk, not by the number of prompts or draws; and by what there is."""

import dataclasses

import numpy as np
import pytest
import tiny_models
import torch
from selfrepair.effects import clean, measure, outcomes, runs
from selfrepair.effects.ablations import Replace, Zero
from selfrepair.effects.clean import clean_run, join
from selfrepair.effects.draws import Key
from selfrepair.effects.runs import Batch, CleanRuns
from selfrepair.errors import InputError
from selfrepair.jobs import session
from selfrepair.jobs.session import Session, bytes_per_row
from selfrepair.models import memory
from selfrepair.models.loading import wrap
from selfrepair.planning.outcomes import COPIES, DISTRIBUTION
from selfrepair.planning.sites import contributions
from selfrepair.prompts.prompt import Prompt

CASES = [("last", "rows"), ("last", "decode"), ("all", "trimmed")]


@pytest.fixture(scope="module")
def loaded():
    return wrap(tiny_models.build("llama", dtype=torch.float32))


def prompts(count: int, positions: str) -> list[Prompt]:
    generator = np.random.default_rng(0)
    lengths = [6 if positions == "all" else 4 + n % 3 for n in range(count)]
    return [Prompt(n, tuple(generator.integers(3, 200, t).tolist())) for n, t in enumerate(lengths)]


def replace(loaded, positions: str, n_draws: int) -> Replace:
    kept = 6 if positions == "all" else 1
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(8, kept, loaded.adapter.d_model, generator=generator)
    values = dict.fromkeys(contributions(range(1, 2)), stored)
    return Replace(Key(0, "s", "replace-s"), n_draws, list(range(8)), values)


def cell(loaded, found: CleanRuns, positions: str, path: str, *, n_draws: int = 3, rows: int = 24):
    """The cell's columns in the order of component, prompt and draw."""
    columns = measure.measure(
        loaded,
        found,
        replace(loaded, positions, n_draws),
        measure.Settings(tuple(contributions(range(1, 2))), n_draws, positions, path, rows),
    )
    order = np.lexsort((columns["draw"], columns["prompt"], columns["site"]))
    return {name: values[order] for name, values in columns.items()}


def clean_runs(loaded, positions, path, count=9, tokens=24, budget=1 << 40) -> CleanRuns:
    return CleanRuns(loaded, prompts(count, positions), positions, path == "rows", tokens, budget)


def same(one, other):
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], atol=2e-5, err_msg=name)


class Counter:
    """The largest numbers of tokens that the engine and the clean runs were given at once."""

    def __init__(self, monkeypatch):
        self.rows = self.clean = 0
        ablate, run = measure.ablate, runs.clean_run

        def counted(loaded, blocks, site, positions, path, asked):
            tokens = 1 if path in ("rows", "decode") else blocks[0].run.length
            self.rows = max(self.rows, sum(tokens * b.n_prompts * b.n_draws for b in blocks))
            return ablate(loaded, blocks, site, positions, path, asked)

        def counted_run(loaded, numbers, input_ids, **settings):
            self.clean = max(self.clean, input_ids.numel())
            return run(loaded, numbers, input_ids, **settings)

        monkeypatch.setattr(measure, "ablate", counted)
        monkeypatch.setattr(runs, "clean_run", counted_run)


@pytest.mark.parametrize(("positions", "path"), CASES)
def test_passes_do_not_grow_with_prompts_or_draws(loaded, positions, path, monkeypatch):
    counter = Counter(monkeypatch)
    cell(loaded, clean_runs(loaded, positions, path, count=9), positions, path)
    few = (counter.rows, counter.clean)
    assert max(few) <= 24
    cell(loaded, clean_runs(loaded, positions, path, count=18), positions, path, n_draws=5)
    assert max(counter.rows, counter.clean) <= 24


@pytest.mark.parametrize(("positions", "path"), [("last", "rows"), ("all", "trimmed")])
def test_runs_that_do_not_fit_are_made_again_with_the_same_values(loaded, positions, path, monkeypatch):
    kept = clean_runs(loaded, positions, path)
    expected = cell(loaded, kept, positions, path)
    assert kept.all_kept and len(kept._kept) == len(kept.batches) > 1
    counter, alive = Counter(monkeypatch), []
    made = runs.clean_run

    def watched(*args, **settings):
        found = made(*args, **settings)
        alive.append(found.nbytes())
        return found

    monkeypatch.setattr(runs, "clean_run", watched)
    not_kept = clean_runs(loaded, positions, path, budget=0)
    same(cell(loaded, not_kept, positions, path), expected)
    assert not not_kept.all_kept and not not_kept._kept
    # Once for the estimate; then once per component and batch, not once per group of rows.
    assert len(alive) == 1 + 2 * len(not_kept.batches)
    # A run that is not kept holds one layer of activations.
    per_token = 3 * loaded.adapter.d_model * 4 * (1 if positions == "last" else 6)
    assert max(alive) < 24 * per_token + 24 * 2 * loaded.n_layers * 2 * 16 * 4
    assert counter.clean <= 24


def test_all_fit_counts_every_prompt_and_layer(loaded):
    """The estimate against what is really kept."""
    for positions, path in (("last", "rows"), ("all", "trimmed")):
        found = clean_runs(loaded, positions, path, count=36)
        size = sum(found.run(number, 0).nbytes() for number in range(len(found.batches)))
        assert clean_runs(loaded, positions, path, count=36, budget=int(size * 1.05)).all_kept
        assert not clean_runs(loaded, positions, path, count=36, budget=int(size * 0.9)).all_kept


@pytest.mark.parametrize(("positions", "path"), CASES)
def test_rows_that_run_out_of_memory_are_halved(loaded, positions, path, monkeypatch, caplog):
    expected = cell(loaded, clean_runs(loaded, positions, path), positions, path)
    ablate, sizes = measure.ablate, []

    def small(loaded, blocks, *args):
        size = sum(block.n_prompts * block.n_draws for block in blocks)
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(size)
        return ablate(loaded, blocks, *args)

    monkeypatch.setattr(measure, "ablate", small)
    same(cell(loaded, clean_runs(loaded, positions, path), positions, path), expected)
    assert sum(sizes) == 2 * 9 * 3 and max(sizes) == 2
    assert "out of GPU memory: resuming with half as many rows" in caplog.text
    # Groups that wait are cut along with the one that failed: failures do not grow with the number of groups.
    assert caplog.text.count("out of GPU memory") <= 2 * 5


@pytest.mark.parametrize("positions", ["last", "all"])
def test_a_clean_run_out_of_memory_is_made_in_halves(loaded, positions, monkeypatch):
    batch = Batch(tuple(prompts(5, "all")))
    whole = runs.run_batch(loaded, batch, positions=positions, keep=None, prefix=True, heads=True)

    def small(loaded, numbers, *args, **settings):
        if len(numbers) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return clean_run(loaded, numbers, *args, **settings)

    monkeypatch.setattr(runs, "clean_run", small)
    joined = runs.run_batch(loaded, batch, positions=positions, keep=None, prefix=True, heads=True)
    assert joined.prompts == whole.prompts == [0, 1, 2, 3, 4]
    for item in dataclasses.fields(whole):
        compare(getattr(joined, item.name), getattr(whole, item.name), item.name)


def compare(one, other, name):
    if isinstance(other, torch.Tensor):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4, msg=name)
    elif isinstance(other, dict):
        assert one.keys() == other.keys() and len(other) > 0
        for key in other:
            compare(one[key], other[key], f"{name} {key}")
    elif isinstance(other, tuple):
        for a, b in zip(one, other, strict=True):
            compare(a, b, name)
    elif dataclasses.is_dataclass(other):
        for item in dataclasses.fields(other):
            compare(getattr(one, item.name), getattr(other, item.name), f"{name}.{item.name}")
    else:
        assert one == other, name


def test_one_row_that_does_not_fit_is_an_error_with_a_way_out(loaded, monkeypatch):
    def never(*_args, **_settings):
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = clean_runs(loaded, "last", "rows")
    monkeypatch.setattr(measure, "ablate", never)
    with pytest.raises(InputError, match="out of memory with a single prompt of 4 tokens") as caught:
        cell(loaded, found, "last", "rows")
    assert "bfloat16" in str(caught.value)
    monkeypatch.setattr(runs, "clean_run", never)
    with pytest.raises(InputError, match="single prompt of 6 tokens"):
        runs.run_batch(loaded, Batch(tuple(prompts(2, "all"))), positions="all", keep=None)


def test_logits_over_the_vocabulary_are_read_a_few_prompts_at_a_time(loaded, monkeypatch):
    ids = torch.randint(3, 200, (10, 4), generator=torch.Generator().manual_seed(0))
    whole = clean_run(loaded, list(range(10)), ids, positions="last", target=torch.arange(10))
    largest, logits = [], loaded.readout.logits
    monkeypatch.setattr(clean, "_READ_AT_ONCE", 3)
    monkeypatch.setattr(clean, "_LOGITS_AT_ONCE", 0)
    monkeypatch.setattr(loaded.readout, "logits", lambda z: largest.append(len(z)) or logits(z))
    parts = clean_run(loaded, list(range(10)), ids, positions="last", target=torch.arange(10))
    assert largest == [3, 3, 3, 1]
    for name in ("argmax", "probability", "readout_error", "clean_y"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-6, rtol=1e-5)


def test_join_of_one_is_itself(loaded):
    run = clean_run(loaded, [4], torch.tensor([[3, 4, 5]]), positions="last")
    compare(join([run]).clean_y, run.clean_y, "clean_y")


# ---- how large a pass is ---------------------------------------------------------------------------------


def test_rows_follow_the_free_memory(loaded, monkeypatch):
    some = prompts(3, "all")
    one = bytes_per_row(loaded, 6)
    for free, expected in ((400 * one, 100), (10**15, session.MOST_ROWS["cpu"]), (0, 1)):
        monkeypatch.setattr(memory, "free", lambda _device, free=free: free)
        assert Session("cpu").rows(loaded, some, {"rows": "auto"}) == expected
        assert Session("cpu").rows(loaded, some, {"rows": 17}) == 17


def test_rows_do_not_change_while_a_session_fills_its_memory(loaded, monkeypatch):
    warm = Session("cpu")
    before = warm.rows(loaded, prompts(3, "all"), {})
    monkeypatch.setattr(memory, "free", lambda _device: 0)
    assert warm.rows(loaded, prompts(3, "all"), {}) == before


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(
    ("positions", "path", "read"),
    [("last", "rows", "last"), ("all", "trimmed", "last"), ("all", "replay", "every")],
)
def test_the_estimate_of_a_row_covers_what_a_pass_allocates(positions, path, read, heads):
    """Largest sum of live tensors in one pass, measured, against the estimate: neither below nor far above."""
    model = tiny_models.build(
        "llama", dtype=torch.float32, hidden_size=256, intermediate_size=1024, head_dim=64
    )
    big = wrap(model)
    length, n_draws = 6, 64
    found = CleanRuns(big, prompts(8, "all"), positions, path == "rows", 10**6, 1 << 40, heads, read)
    found.run(0, 2)
    sites = big.head_sites(2) if heads else None
    tokens = 8 * n_draws * (1 if path == "rows" else length) * (len(sites) if heads else 1)
    zeros(big, found, positions, path, sites=sites)  # what is made once per model
    with Allocations() as seen:
        zeros(big, found, positions, path, n_draws, sites)
    assert 0.4 < seen.peak / (tokens * bytes_per_row(big, length)) < 1.0


def test_distributions_take_the_memory_that_the_estimate_states(monkeypatch):
    """With a soft-cap, an output scale and draws that share a clean distribution."""
    settings = {"head_dim": 16, "query_pre_attn_scalar": 16, "vocab_size": 20_000}
    large = wrap(tiny_models.build("gemma2", torch.float32, num_hidden_layers=1, **settings))
    generator = torch.Generator().manual_seed(0)
    clean_final, final = torch.randn(4, 64, generator=generator), torch.randn(40, 64, generator=generator)
    reading = torch.arange(4).repeat_interleave(10)
    monkeypatch.setattr(outcomes, "CHUNK_BYTES", 12 * COPIES * 20_000 * 4)
    assert outcomes.rows_per_chunk(20_000, 4) == 12
    with Allocations() as seen:
        columns = outcomes.distribution_changes(
            large.readout, clean_final, reading, final, reading, DISTRIBUTION
        )
    assert {len(column) for column in columns.values()} == {40}
    assert 0.4 < seen.peak / outcomes.CHUNK_BYTES < 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_weight_is_copied_once_per_prompt(dtype):
    """As products of strided 16-bit views do: the last positions of many prompts, at the head and in the last layer."""
    settings = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64, "vocab_size": 8192}
    big = wrap(tiny_models.build("llama", dtype=dtype, **settings))
    some = prompts(64, "all")
    head = 8192 * 256 * 4  # bytes, in float32
    with Allocations() as seen:
        found = CleanRuns(big, some, "all", False, 10**6, 1 << 40)
        found.run(0, 2)
    assert seen.peak < 4 * head  # copies for 64 prompts: 32 to 64 times the head
    zeros(big, found, "all", "trimmed")  # what is made once per model
    with Allocations() as seen:
        zeros(big, found, "all", "trimmed")
    assert seen.peak < 64 * 6 * bytes_per_row(big, 6)


def zeros(loaded, found, positions, path, n_draws=1, sites=None):
    """One cell in one pass."""
    sites = tuple(contributions(range(2, 3)) if sites is None else sites)
    settings = measure.Settings(sites, n_draws, positions, path, 10**6)
    with torch.no_grad():
        measure.measure(loaded, found, Zero(), settings)


class Allocations:
    """Peak of the memory that PyTorch allocates on the CPU within the block."""

    def __enter__(self):
        activity = torch.profiler.ProfilerActivity.CPU
        self._profile = torch.profiler.profile(activities=[activity], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error):
        self._profile.__exit__(*error)
        events = self._profile.profiler.kineto_results.events()
        steps = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        self.peak = max(np.cumsum([size for _, size in steps]))


def test_a_container_s_limit_counts(tmp_path, monkeypatch):
    group = tmp_path / "fs" / "job" / "step"
    group.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:    8000000 kB\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_CGROUP_ROOT", tmp_path / "fs")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    cpu = torch.device("cpu")
    assert memory.free(cpu) == 8_000_000 * 1024  # no limit stated
    for place, limit, used, cached in ((group, "max", 0, 0), (group.parent, 5_000_000, 3_000_000, 1_000_000)):
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.current").write_text(f"{used}\n")
        (place / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
    assert memory.free(cpu) == 3_000_000  # the enclosing group's: cached files can be dropped
    (tmp_path / "cgroup").write_text("5:memory:/slurm/job_1\n4:cpu:/\n")
    old = tmp_path / "fs" / "memory" / "slurm" / "job_1"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("700\n")
    (old / "memory.usage_in_bytes").write_text("500\n")
    (old / "memory.stat").write_text("total_inactive_file 50\n")
    assert memory.free(cpu) == 250
