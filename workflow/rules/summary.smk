rule summary:
    input:
        cells=PLAN.cells_of,
        clean=PLAN.clean_of,
    output:
        numerics=grid.numerics_path("{experiment}", "{model}"),
        layers=grid.layers_path("{experiment}", "{model}"),
        downstream=grid.downstream_path("{experiment}", "{model}"),
        verdicts=grid.verdicts_path("{experiment}", "{model}"),
    log:
        grid.log_path("{experiment}", "{model}", "summary"),
    conda:
        "../../envs/report.yaml"
    params:
        spec=PLAN.summary,
    script:
        "../../scripts/summary.py"
