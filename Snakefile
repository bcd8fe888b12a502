# Self-repair in language models: from prompts to reports. The grammar of results/:
#
#   results/{experiment}/{model}/
#     tokens/{dataset}.parquet                          the kept prompts, split into source and store
#     activations/{dataset}/layer={layer}.safetensors   what attention and MLP add, on the store prompts
#     clean/{dataset}.parquet                           the clean run of the source prompts
#     std.safetensors                                   moments of the activations over all data sets
#     effects/source={source}/ablation={ablation}/layer={layer}.parquet     one cell
#     downstream_heads/source={source}/ablation={ablation}/layer={layer}.parquet     beside a cell, if heads are ablated
#     {averages,selections}/source={source}/ablation={ablation}/layer={layer}.parquet  beside a cell, with `read: every`
#     manifest.parquet                                  the cells of the current configuration, with their digests
#     numerics.parquet  summary/{layers,verdicts,downstream,ablations,audit,selections,rushing_nanda}.parquet
#     figures/{figure}.{html,svg,png,parquet}
#     report.html
#     logs/{rule}/...
#   results/{experiment}/report.html                    where an experiment has several models
#   results/.cells/  results/.cache/                    finished cells and digests, by content (`make prune`)
#
# Layers count from 0. A source is the data set whose prompts are ablated; `ablation=self` is the control.

from snakemake.utils import min_version

min_version("9.27")  # priorities that depend on wildcards

# Snakemake would merge a `--configfile` into this one; here it takes its place.
if not workflow.overwrite_configfiles:

    configfile: "config.yaml"


include: "workflow/rules/common.smk"


rule all:
    default_target: True
    input:
        PLAN.targets(),


include: "workflow/rules/tokens.smk"
include: "workflow/rules/activations.smk"
include: "workflow/rules/effects.smk"
include: "workflow/rules/summary.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/report.smk"
