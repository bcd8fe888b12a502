# Some cells have further files, and a rule must name its outputs: one rule for each set of files.
for name, (kinds, experiments) in grid.effects_rules(PLAN.config).items():

    rule:
        name:
            name
        input:
            unpack(PLAN.cell_inputs),
        output:
            **grid.cell_files("{experiment}", "{model}", "{source}", "{ablation}", "{layer}", kinds=kinds),
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
        group:
            batch_job
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
