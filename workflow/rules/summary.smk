rule manifest:
    input:
        cells=PLAN.cells_of,
        averages=PLAN.extra(grid.AVERAGES),
        selections=PLAN.extra(grid.SELECTIONS),
        downstream_heads=PLAN.extra(grid.DOWNSTREAM_HEADS),
    output:
        manifest=grid.manifest_path("{experiment}", "{model}"),
    log:
        grid.log_path("{experiment}", "{model}", "manifest"),
    conda:
        "../../envs/report.yaml"
    params:
        spec=PLAN.manifest,
    script:
        "../../scripts/manifest.py"


rule summary:
    input:
        cells=PLAN.analysed_of,
        downstream_heads=PLAN.extra(grid.DOWNSTREAM_HEADS),
        selections=PLAN.extra(grid.SELECTIONS),
        clean=PLAN.clean_of,
        tokens=PLAN.tokens_of,
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
