# One file per layer, and a rule must name its outputs: one rule for each number of layers.
for place, (count, models) in enumerate(PLAN.layer_counts().items()):

    rule:
        name:
            "activations" if place == 0 else f"activations_{count}_layers"
        input:
            tokens=grid.tokens_path("{experiment}", "{model}", "{dataset}"),
        output:
            layers=grid.activations_paths("{experiment}", "{model}", "{dataset}", count),
            clean=grid.clean_path("{experiment}", "{model}", "{dataset}"),
        log:
            grid.log_path("{experiment}", "{model}", "activations", ["{dataset}"]),
        wildcard_constraints:
            model=one_of(models),
        priority: priority("activations")
        conda:
            "../../envs/model.yaml"
        resources:
            gpu=gpus,
            mem_mb=memory_mb,
            runtime=minutes("activations"),
        params:
            spec=PLAN.activations,
            runtime=runtime,
        script:
            "../../scripts/activations.py"


rule std:
    input:
        layers=PLAN.std_inputs,
    output:
        std=grid.std_path("{experiment}", "{model}"),
    log:
        grid.log_path("{experiment}", "{model}", "std"),
    priority: priority("std")
    conda:
        "../../envs/model.yaml"
    resources:
        gpu=gpus,
    params:
        spec=PLAN.std,
        runtime=runtime,
    script:
        "../../scripts/std.py"
