# Which figures there are depends on the experiment, and a rule must name its outputs: one rule for each choice.
for place, (names, experiments) in enumerate(PLAN.figure_sets().items()):

    rule:
        name:
            "figures" if place == 0 else f"figures_{place + 1}"
        input:
            **grid.summary_paths("{experiment}", "{model}"),
            numerics=grid.numerics_path("{experiment}", "{model}"),
            clean=PLAN.clean_of,
            cells=PLAN.cells_of,
        output:
            figures=[captioned(path) for path in PLAN.figure_files(names, "{experiment}", "{model}")],
        log:
            grid.log_path("{experiment}", "{model}", "figures"),
        wildcard_constraints:
            experiment=one_of(experiments),
        conda:
            "../../envs/report.yaml"
        params:
            spec=PLAN.figures,
        script:
            "../../scripts/figures.py"
