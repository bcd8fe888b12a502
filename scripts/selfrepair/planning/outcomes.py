"""The table of outcomes: what the ablation of a contribution changes beside the target's centred logit."""

LOGIT = "logit"  # the target's centred logit with its ledger: always measured
FOIL = "foil"
# Name in the configuration -> column of the effects table.
OUTCOMES = {"logprob": "logprob_change", "kl": "kl", "top1": "top1_changed", FOIL: "foil_logit_change"}
SHARES = (OUTCOMES["top1"],)  # columns of 0 and 1, whose means are shares
# Read from the whole next-token distribution: one product with the unembedding matrix per ablated run.
DISTRIBUTION = ("logprob", "kl", "top1")
CHUNK_BYTES = 1 << 28  # largest memory of the distributions of one chunk of ablated runs
# Vocabulary-sized tensors of a row that exist at once: logits of both runs, their parts while they are joined and
# scaled, log probabilities of both, and the terms of the divergence.
COPIES = 8


def distribution_bytes(vocabulary: int, itemsize: int) -> int:
    """Return the memory of the distributions of one chunk: CHUNK_BYTES, or more if a single row needs more."""
    return max(CHUNK_BYTES, COPIES * vocabulary * itemsize)


def ordered(outcomes: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Return `outcomes` in the table's order, with `logit` first: the order in the configuration reruns nothing."""
    return (LOGIT, *(name for name in OUTCOMES if name in outcomes))
