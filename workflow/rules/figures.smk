# The set of figures depends on the experiment, and a rule must name its outputs: one rule per set.
for number, (names, experiments) in enumerate(PLAN.figure_sets().items()):

    rule:
        name:
            "figures" if number == 0 else f"figures_{number + 1}"
        input:
            **grid.summary_paths("{experiment}", "{model}"),
            clean=PLAN.clean_of,
            tokens=PLAN.tokens_of,
            cells=PLAN.analysed_of,
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
