"""Whole cells, as the stages write them, against one hooked full forward per row.

Every ablation, both positions, both components: the replacement value of each row is computed again by tools/rederive
from full forwards of the prompts, and its effects by the reference.
"""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from selfrepair.effects import reference, runs
from selfrepair.effects.columns import COLUMNS, EFFECT, LOGIT, PROFILE, names
from selfrepair.effects.runs import CleanRuns
from selfrepair.jobs.job import Job
from selfrepair.jobs.session import Session
from selfrepair.jobs.stages import activations, effects, std
from selfrepair.models.loading import LoadedModel, wrap
from selfrepair.models.weights import ModelSpec
from selfrepair.planning.outcomes import OUTCOMES
from selfrepair.planning.sites import Site, contributions
from selfrepair.prompts.prompt import Prompt
from selfrepair.storage import schemas, tables
from selfrepair.tools import rederive

SEED, MODEL, LENGTH, N_SOURCE, N_STORE, N_DRAWS = 5, "tiny", 7, 3, 4, 3
ABLATIONS = ("zero", "self", "mean", "random", "gaussian", "noise", "replace-here", "replace-there")


class _Tokenizer:
    def decode(self, ids):
        return " ".join(map(str, ids))


class _Session(Session):
    """A session whose model is handed to it."""

    def __init__(self, loaded):
        super().__init__("cpu")
        self._loaded = loaded

    def model(self, spec, digest=None):
        return self._loaded

    def tokenizer(self, path, revision):
        return _Tokenizer()


@dataclass
class Experiment:
    """Two data sets run through the stages on a tiny model."""

    root: Path
    loaded: LoadedModel
    positions: str
    ids: dict[str, dict[int, list[int]]]
    stored: dict[str, list[int]]
    rows: int = 40  # several chunks per cell
    base: dict = field(init=False)
    forwards: dict = field(default_factory=dict)
    oracle: rederive.Values | None = None

    def __post_init__(self):
        self.session = _Session(self.loaded)
        spec = {"path": "tiny", "revision": None, "dtype": "float64"}
        self.loaded.spec = ModelSpec(**spec)
        self.base = {"experiment": "e", "model": MODEL, "model_spec": spec, "layers": self.loaded.n_layers}
        self.base |= {
            "heads": True,
            "positions": self.positions,
            "target": "argmax",
            "seed": SEED,
            "outcomes": ["logit", *OUTCOMES],
        }

    def path(self, *parts):
        return str(self.root.joinpath(*parts))

    def layers(self, dataset):
        return [
            self.path("activations", dataset, f"layer={n}.safetensors") for n in range(self.loaded.n_layers)
        ]

    def prepare(self):
        for dataset in self.ids:
            self._tokens(dataset)
            output = {"layers": self.layers(dataset), "clean": self.path("clean", f"{dataset}.parquet")}
            params = {**self.base, "dataset": dataset}
            tokens = self.path("tokens", f"{dataset}.parquet")
            activations.run(
                Job("activations", {"tokens": tokens}, output, params, {"rows": 30}), self.session
            )
        params = {"datasets": list(self.ids), "layers": self.loaded.n_layers}
        files = [file for dataset in self.ids for file in self.layers(dataset)]
        std.run(Job("std", {"layers": files}, {"std": self.path("std.safetensors")}, params), self.session)

    def _tokens(self, dataset):
        ids = self.ids[dataset]
        columns = {
            "prompt": list(ids),
            "split": ["store" if n in self.stored[dataset] else "source" for n in ids],
            "text": [str(n) for n in ids],
            "text_sha256": [str(n) for n in ids],
            "input_ids": list(ids.values()),
            "answer_ids": [[n % 200] for n in ids],
            "foil_ids": [[(n + 7) % 200, 3] for n in ids],
        }
        tables.write(self.path("tokens", f"{dataset}.parquet"), columns, schemas.TOKENS, {})

    def cell(self, ablation, layer, components=("attn", "mlp")):
        one = ablation in ("zero", "self", "mean")
        params = {
            **self.base,
            "source": "here",
            "ablation": ablation,
            "layer": layer,
            "components": list(components),
        }
        params["draws"] = 1 if one else N_DRAWS
        inputs = {"tokens": self.path("tokens", "here.parquet"), "clean": self.path("clean", "here.parquet")}
        if ablation == "mean" or ablation.startswith("replace-"):
            dataset = "here" if ablation == "mean" else ablation.removeprefix("replace-")
            inputs["activations"] = self.layers(dataset)[layer]
        if ablation in ("random", "gaussian"):
            inputs["std"] = self.path("std.safetensors")
        output = self.path("effects", f"{ablation}-{layer}-{self.rows}-{'-'.join(components)}.parquet")
        effects.run(Job("effects", inputs, {"cell": output}, params, {"rows": self.rows}), self.session)
        return tables.read(output).to_pylist()

    # ---- the same, from full forwards --------------------------------------------------------------------

    def forward(self, dataset, prompt):
        place = (dataset, prompt)
        if place not in self.forwards:
            self.forwards[place] = reference.forward(self.loaded, torch.tensor(self.ids[dataset][prompt]))
        return self.forwards[place]

    def stored_values(self, dataset, site):
        """(store prompt, P, d_model), or a head's parts (store prompt, P, width)"""
        found = [self.forward(dataset, n).ablatable(site) for n in self.stored[dataset]]
        return torch.stack([value if self.positions == "all" else value[-1:] for value in found])

    def value(self, row):
        """What must have replaced the row's contribution."""
        if self.oracle is None:
            prompts = {
                d: rederive.Prompts({n: torch.tensor(ids) for n, ids in self.ids[d].items()}, self.stored[d])
                for d in self.ids
            }
            layers = range(self.loaded.n_layers)
            sites = {*contributions(layers), *(site for n in layers for site in self.loaded.head_sites(n))}
            self.oracle = rederive.Values(self.loaded, prompts, self.positions, frozenset(sites))
        value = self.oracle.value(row, SEED)
        assert row["replacement"] == self.oracle.replacement(row, SEED, N_DRAWS)
        return value


def make(root, positions, dtype, model_type="llama", **settings):
    model = tiny_models.build(model_type, **settings)
    tiny_models.exact(model)
    loaded = wrap(model.to(dtype))
    generator = np.random.default_rng(0)
    ids, stored = {}, {}
    for dataset, offset in (("here", 0), ("there", 50)):
        lengths = [LENGTH if positions == "all" else 4 + n % 3 for n in range(N_SOURCE + N_STORE)]
        ids[dataset] = {offset + n: generator.integers(3, 200, t).tolist() for n, t in enumerate(lengths)}
        stored[dataset] = list(ids[dataset])[N_SOURCE:]
    experiment = Experiment(root, loaded, positions, ids, stored)
    experiment.prepare()
    return experiment


@pytest.fixture(scope="module", params=["last", "all"])
def experiment(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp(request.param), request.param, torch.float64)


def disagreement(experiment, rows):
    """Largest absolute difference of any column of any row from the reference, in logits."""
    worst = 0.0
    for row in rows:
        ids = torch.tensor(experiment.ids["here"][row["prompt"]])
        value = experiment.value(row)
        expected = reference.effects(
            experiment.loaded,
            ids,
            Site.from_row(row),
            value,
            row["target"],
            experiment.forward("here", row["prompt"]),
            foil=(row["prompt"] + 7) % 200,
        )
        assert row["position"] == len(ids) - 1
        for name in COLUMNS:
            wanted = getattr(expected, name).numpy()
            assert (row[name] is None) == bool(np.isnan(wanted).any()), name
            if row[name] is not None:
                worst = max(worst, float(np.abs(np.subtract(row[name], wanted)).max()))
    return worst


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_row_of_a_cell_agrees_with_a_full_forward(experiment, ablation):
    rows = [row for layer in (1, 3) for row in experiment.cell(ablation, layer)]
    draws_per_prompt = 1 if ablation in ("zero", "self", "mean") else N_DRAWS
    places = {(r["layer"], r["component"], r["prompt"], r["draw"]) for r in rows}
    wanted = itertools.product((1, 3), ("attn", "mlp"), range(N_SOURCE), range(draws_per_prompt))
    assert places == set(wanted) and len(rows) == len(places)
    assert disagreement(experiment, rows) < 1e-5
    if ablation != "self":
        assert max(abs(row["delta_ablate"]) for row in rows) > 0.05


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_head_of_a_cell_agrees_with_a_full_forward(experiment, ablation):
    """Part h of the projection's input is replaced in the reference by a hook; the engine replaces f(x)."""
    rows = experiment.cell(ablation, 1, ("heads",))
    draws_per_prompt = 1 if ablation in ("zero", "self", "mean") else N_DRAWS
    heads = experiment.loaded.heads(1).n_heads
    keys = {(r["component"], r["head"], r["prompt"], r["draw"]) for r in rows}
    wanted = itertools.product(("head",), range(heads), range(N_SOURCE), range(draws_per_prompt))
    assert keys == set(wanted) and len(rows) == len(keys)
    assert disagreement(experiment, rows) < 1e-5
    if ablation != "self":
        assert max(abs(row["delta_ablate"]) for row in rows) > 0.02


def test_heads_of_a_layer_add_up_to_its_attention(experiment):
    """A model without biases and post-norms: delta_unembed of the heads sums to that of the attention."""
    rows = experiment.cell("zero", 1, ("attn", "heads"))
    for prompt in range(N_SOURCE):
        parts = {r["head"]: r for r in rows if r["prompt"] == prompt}
        whole = parts.pop(None)
        assert len(parts) == 4
        total = sum(part["delta_unembed"] for part in parts.values())
        assert total == pytest.approx(whole["delta_unembed"], abs=1e-5)
        for part in parts.values():
            assert part["direct_effect"] == pytest.approx(-part["delta_unembed"], abs=1e-6)


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"num_key_value_heads": 1, "attention_bias": True}),
        ("gemma2", {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}),
        ("gpt_neox", {}),
        ("granite", {"residual_multiplier": 0.22}),
    ],
)
def test_heads_of_other_blocks(tmp_path, positions, model_type, settings):
    """Multi-query attention with biases, post-norm, parallel block, residual multiplier."""
    with tiny_models.float64_throughout():
        experiment = make(tmp_path, positions, torch.float64, model_type, **settings)
        rows = experiment.cell("zero", 1, ("heads",)) + experiment.cell("replace-there", 3, ("heads",))
        assert disagreement(experiment, rows) < 1e-5


@pytest.mark.parametrize("positions", ["last", "all"])
def test_the_only_head_is_the_attention(tmp_path, positions):
    settings = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
    experiment = make(tmp_path, positions, torch.float64, **settings)
    for ablation in ("zero", "mean", "replace-there", "noise"):
        rows = experiment.cell(ablation, 2, ("attn", "heads"))
        whole = [row for row in rows if row["head"] is None]
        heads = [row for row in rows if row["head"] == 0]
        assert len(whole) == len(heads) > 0
        for one, other in zip(whole, heads, strict=True):
            assert one["replacement"] == other["replacement"]
            for name in names(EFFECT, LOGIT, PROFILE):
                np.testing.assert_allclose(other[name], one[name], atol=1e-6, err_msg=f"{ablation} {name}")


@pytest.mark.parametrize("positions", ["last", "all"])
def test_float32_agrees_within_1e_4_logits(tmp_path, positions):
    experiment = make(tmp_path, positions, torch.float32)
    for ablation in ("zero", "replace-there", "noise"):
        assert disagreement(experiment, experiment.cell(ablation, 1)) < 1e-4


def test_chunks_do_not_change_values(experiment):
    small = experiment.cell("replace-there", 1)
    experiment.rows = 4000
    large = experiment.cell("replace-there", 1)
    experiment.rows = 40
    for one, other in zip(small, large, strict=True):
        assert (one["prompt"], one["draw"], one["replacement"]) == (
            other["prompt"],
            other["draw"],
            other["replacement"],
        )
        assert one["delta_ablate"] == pytest.approx(other["delta_ablate"], abs=1e-6)


def test_the_control_changes_nothing(experiment):
    for layer in range(experiment.loaded.n_layers):
        for row in experiment.cell("self", layer):
            assert abs(row["delta_ablate"]) < 1e-6


def test_clean_table(experiment):
    clean = tables.read(experiment.path("clean", "here.parquet")).to_pylist()
    norm = experiment.loaded.readout.norm
    weight = experiment.loaded.model.get_output_embeddings().weight.double()
    for row in clean:
        run = experiment.forward("here", row["prompt"])
        target = int(run.logits.argmax())
        assert row["target"] == target
        assert row["correct"] == (target == row["prompt"] % 200)
        assert row["target_probability"] == pytest.approx(float(run.logits.softmax(-1)[target]), abs=1e-6)
        assert row["clean_logit"] == pytest.approx(float(run.logits[target] - run.logits.mean()), abs=1e-5)
        assert row["closure_error"] < 1e-6 and row["readout_error"] < 1e-5
        total = row["embedding_effect"] + sum(row["unembed_attn"]) + sum(row["unembed_mlp"])
        assert total == pytest.approx(row["clean_logit"], abs=1e-5)  # no biases in this model
        assert row["sigma"] == pytest.approx(float(norm.sigma(run.final)), rel=1e-6)
        for layer, component in itertools.product(range(4), ("attn", "mlp")):
            x = run.contributions[Site(layer, component)][-1].double()
            by_itself = weight @ (x / norm.sigma(x) * norm.gain)
            own = row[f"unembed_own_norm_{component}"][layer]
            assert own == pytest.approx(float(by_itself[target] - by_itself.mean()), abs=1e-5)


def test_stored_activations_are_those_of_full_forwards(experiment):
    from selfrepair.storage import tensors

    for dataset, layer in itertools.product(("here", "there"), range(4)):
        stored = tensors.read(experiment.layers(dataset)[layer])
        assert stored["prompt"].tolist() == experiment.stored[dataset]
        for component in ("attn", "mlp"):
            expected = experiment.stored_values(dataset, Site(layer, component))
            actual = stored[component]
            actual = actual if experiment.positions == "all" else actual[:, None]
            torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_source_prompts_run_once(tmp_path, positions, monkeypatch):
    """A worker's cells start from the clean runs that the activations were taken from, and a fresh one's are equal."""
    experiment = make(tmp_path, positions, torch.float32)
    experiment.rows = 30  # as the clean runs were batched
    calls = []
    real = runs.clean_run
    monkeypatch.setattr(runs, "clean_run", lambda *a, **k: calls.append(a[1]) or real(*a, **k))
    components = ("attn", "mlp", "heads")  # the activations were taken for all three
    kept = [experiment.cell("zero", layer, components) for layer in (1, 3)]
    assert calls == []
    experiment.session = _Session(experiment.loaded)
    assert [experiment.cell("zero", layer, components) for layer in (1, 3)] == kept
    assert {prompt for batch in calls for prompt in batch} == set(range(N_SOURCE))


def test_runs_with_another_target_do_not_serve(experiment):
    """Clean runs know the target they were read at: a clean table from elsewhere may name another."""
    sources = [Prompt(n, tuple(experiment.ids["here"][n])) for n in range(N_SOURCE)]
    path = "rows" if experiment.positions == "last" else "trimmed"
    found = CleanRuns(experiment.loaded, sources, experiment.positions, path == "rows", 30, 1 << 30)
    assert found.serves(sources)
    own = {n: int(experiment.forward("here", n).logits.argmax()) for n in range(N_SOURCE)}
    same = [Prompt(prompt.id, prompt.input_ids, own[prompt.id]) for prompt in sources]
    assert not found.serves(same), "nothing has run yet"
    for number in range(len(found.batches)):
        found.run(number, 0)
    assert found.serves(same)
    assert not found.serves([Prompt(p.id, p.input_ids, p.target + (p.id == 1)) for p in same])
    assert not found.serves(same[:-1])
