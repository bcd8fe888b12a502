rule report:
    input:
        **grid.summary_paths("{experiment}", "{model}"),
        figures=PLAN.figures_of,
        numerics=grid.numerics_path("{experiment}", "{model}"),
        clean=PLAN.clean_of,
        tokens=PLAN.tokens_of,
    output:
        report=captioned(grid.report_path("{experiment}", "{model}")),
    log:
        grid.log_path("{experiment}", "{model}", "report"),
    conda:
        "../../envs/report.yaml"
    params:
        spec=PLAN.report,
    script:
        "../../scripts/report.py"


rule crossmodel:
    input:
        verdicts=PLAN.verdicts_of,
        numerics=PLAN.numerics_of,
    output:
        report=captioned(grid.crossmodel_report_path("{experiment}")),
    log:
        f"{grid.RESULTS}/{{experiment}}/logs/crossmodel.log",
    conda:
        "../../envs/report.yaml"
    params:
        spec=PLAN.crossmodel,
    script:
        "../../scripts/crossmodel.py"
