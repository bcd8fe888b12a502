# Some cells have further files, and a rule must name its outputs: one rule for each set of files.
# A cell is a shell command that starts `scripts/effects.py`. With `script:` its start would take three times as long.
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
            command=cell_command,
        shell:
            "{params.command} {log:q}"
