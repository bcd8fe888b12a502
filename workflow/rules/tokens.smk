# The data file is not an input: its path and the digest of its content are in `spec`, so its date does not count.
rule tokens:
    output:
        tokens=grid.tokens_path("{experiment}", "{model}", "{dataset}"),
    log:
        grid.log_path("{experiment}", "{model}", "tokens", ["{dataset}"]),
    priority: priority("tokens")
    conda:
        "../../envs/model.yaml"
    resources:
        gpu=1000,  # all there are: no other job starts, and no model is loaded, while prompts are still unread
    params:
        spec=PLAN.tokens,
        runtime=runtime,
    script:
        "../../scripts/tokens.py"
