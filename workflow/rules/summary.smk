rule summary:
    input:
        cells=PLAN.cells_of,
        clean=PLAN.clean_of,
    output:
        **grid.summary_paths("{experiment}", "{model}"),
        numerics=grid.numerics_path("{experiment}", "{model}"),
    log:
        grid.log_path("{experiment}", "{model}", "summary"),
    conda:
        "../../envs/report.yaml"
    params:
        spec=PLAN.summary,
    script:
        "../../scripts/summary.py"
