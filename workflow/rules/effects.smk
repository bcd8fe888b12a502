# With heads a cell has a second file, and a rule must name its outputs: one rule for cells with and one without.
for name, (heads, experiments) in grid.effects_rules(PLAN.config).items():

    rule:
        name:
            name
        input:
            unpack(PLAN.cell_inputs),
        output:
            **grid.cell_files("{experiment}", "{model}", "{source}", "{ablation}", "{layer}", heads=heads),
        log:
            grid.log_path(
                "{experiment}",
                "{model}",
                "effects",
                ["source={source}", "ablation={ablation}", "layer={layer}"],
            ),
        wildcard_constraints:
            experiment=one_of(experiments),
        priority: priority("effects")
        conda:
            "../../envs/model.yaml"
        resources:
            gpu=gpus,
            mem_mb=memory_mb,
            runtime=minutes("effects"),
        params:
            spec=PLAN.effects,
            runtime=runtime,
        script:
            "../../scripts/effects.py"
