"""Memory and time of a billion-parameter model on a small grid: last and all positions, two dtypes.

A Llama of 16 layers (d_model 2048, 32 query and 8 key heads, MLP 8192, vocabulary 32000; 1.1 billion parameters) with
random weights is written once, 2.2 GB of bfloat16 safetensors, and each measurement runs in a process of its own:

    python tests/benchmark/one_billion.py DIRECTORY

DIRECTORY holds the model between runs. Prints one line per dtype and kind of positions; `peak` is the largest
resident size of the process (VmHWM), of which `mapped` were pages of the weight file, which the system may drop.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LIMIT_GIB = 8.0
GRID = [("last", 24, 32, 3), ("all", 3, 64, 2)]  # positions, prompts, tokens per prompt, draws
DTYPES = ("bfloat16", "float32")
LAYERS = (8, 15)


def write_model(directory: Path) -> None:
    """Random weights with unit-sized activations, in two shards."""
    import torch
    from safetensors.torch import save_file

    d, inner, kv, vocabulary = 2048, 8192, 512, 32000
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, scale: float) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0, scale, generator=generator)

    def layer(number: int) -> dict[str, torch.Tensor]:
        shapes = {
            "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (inner, d),
            "mlp.up_proj": (inner, d),
            "mlp.down_proj": (d, inner),
        }
        found = {
            f"model.layers.{number}.{name}.weight": matrix(*shape, shape[1] ** -0.5)
            for name, shape in shapes.items()
        }
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{number}.{name}.weight"] = torch.ones(d, dtype=torch.bfloat16)
        return found

    directory.mkdir(parents=True, exist_ok=True)
    ends = {
        "model.embed_tokens.weight": matrix(vocabulary, d, 1.0),
        "model.norm.weight": torch.ones(d, dtype=torch.bfloat16),
        "lm_head.weight": matrix(vocabulary, d, d**-0.5),
    }
    where = {}
    for shard, numbers in enumerate((range(8), range(8, 16)), 1):
        tensors = {key: value for number in numbers for key, value in layer(number).items()}
        if shard == 1:
            tensors |= ends
        name = f"model-{shard:05d}-of-00002.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(CONFIG))


def memory() -> dict[str, float]:
    """This process's resident memory now and at its highest, in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmHWM", "Rss"))}
    return {name: int(size) / 2**20 for name, size in sizes.items()}


def measure(directory: Path, dtype: str) -> None:
    """Load the model and run the grid; prints as it goes."""
    import torch
    from selfrepair.effects import measure as cells
    from selfrepair.effects.ablations import Replace, Self, Zero
    from selfrepair.effects.draws import Key
    from selfrepair.jobs.session import Session
    from selfrepair.models.weights import ModelSpec
    from selfrepair.planning.sites import COMPONENTS, Site
    from selfrepair.prompts.prompt import Prompt

    torch.set_num_threads(2)
    session = Session("cpu")
    began = time.perf_counter()
    loaded = session.model(ModelSpec(str(directory), None, dtype))
    print(f"{dtype}: loaded in {time.perf_counter() - began:.1f} s, {memory()}", flush=True)
    generator = torch.Generator().manual_seed(1)
    for positions, n_prompts, length, n_draws in GRID:
        began = time.perf_counter()
        ids = torch.randint(3, CONFIG["vocab_size"], (n_prompts, length), generator=generator)
        prompts = [Prompt(number, tuple(row)) for number, row in enumerate(ids.tolist())]
        rows = session.rows(loaded, prompts, {})
        choice = session.path(loaded, prompts, positions)
        print(f"{dtype} {positions}: path `{choice.path}`, {memory()}", flush=True)
        runs = session.clean_runs(loaded, positions, prompts, positions, choice.path, rows)
        kept = 1 if positions == "last" else length
        store = torch.randn(8, kept, CONFIG["hidden_size"], generator=generator).to(loaded.dtype)
        key = Key(0, "random", "replace")
        total, squares, floor = 0, 0.0, 0.0
        for layer in LAYERS:
            sites = tuple(Site(layer, component) for component in COMPONENTS)
            stored = dict.fromkeys(sites, store)
            for ablation in (Self(key), Zero(), Replace(key, n_draws, list(range(8)), stored)):
                draws = n_draws if isinstance(ablation, Replace) else 1
                settings = cells.Settings(sites, draws, positions, choice.path, rows)
                found = cells.measure(loaded, runs, ablation, settings)
                change = found["delta_ablate"].astype(float)
                explained = sum(
                    found[name].astype(float)
                    for name in ("direct_effect", "compensation_attn", "compensation_mlp", "norm_effect")
                )
                assert abs(change - explained).max() < (0.2 if dtype == "bfloat16" else 1e-3)
                if isinstance(ablation, Self):
                    floor = max(floor, abs(change).max())
                else:
                    total, squares = total + len(change), squares + (change**2).sum()
        print(
            f"{dtype} {positions}: {total} ablations, path `{choice.path}`, {time.perf_counter() - began:.1f} s; "
            f"effects {(squares / total) ** 0.5:.3g} rms, noise floor {floor:.2g}; "
            f"peak {memory()['VmHWM']:.2f} GiB",
            flush=True,
        )
    peak = memory()
    mapped = peak["RssFile"]
    print(f"{dtype}: peak {peak['VmHWM']:.2f} GiB, {mapped:.2f} GiB mapped at the end", flush=True)
    assert peak["VmHWM"] < LIMIT_GIB, f"more than {LIMIT_GIB} GiB"


def main() -> None:
    """Write the model if it is not there, then measure each dtype in a process of its own."""
    directory = Path(sys.argv[1])
    if len(sys.argv) > 2:
        measure(directory, sys.argv[2])
        return
    if not (directory / "config.json").exists():
        subprocess.run([sys.executable, __file__, str(directory), "write"], check=True)
    for dtype in DTYPES:
        subprocess.run([sys.executable, __file__, str(directory), dtype], check=True, env=os.environ)


if __name__ == "__main__":
    if sys.argv[2:] == ["write"]:
        write_model(Path(sys.argv[1]))
    else:
        main()
