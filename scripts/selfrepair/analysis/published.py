"""Published self-repair of attention heads: Rushing and Nanda 2024 (arXiv 2402.15390), from their stored tables.

Later half of the layers, resample ablation, windows of 128 tokens of the Pile. Shares of the clean direct effect.
"""

from dataclasses import dataclass

SOURCE = "Rushing and Nanda 2024, arXiv 2402.15390"
PUBLISHED_QUANTILE = 0.02  # the share of a head's rows that they select


@dataclass(frozen=True)
class Published:
    """Shares of the direct effect. None: not published."""

    total: float  # ratio of sums, the 2 % of rows with the largest direct effect
    norm: float  # mean of clipped shares, the same rows
    heads: float
    mlps: float
    unselected: float | None  # ratio of sums, all rows


# By Hugging Face id.
MODELS = {
    "openai-community/gpt2": Published(0.39, 0.32, 0.22, 0.22, -0.44),
    "openai-community/gpt2-medium": Published(0.43, 0.29, 0.23, 0.25, None),
    "EleutherAI/pythia-160m": Published(0.27, 0.34, 0.10, 0.30, -0.36),
    "EleutherAI/pythia-410m": Published(0.51, 0.25, 0.16, 0.36, None),
}
