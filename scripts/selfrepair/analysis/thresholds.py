"""The thresholds behind every class and warning. The report's guide states them from here."""

# Intervals and tests
LEVEL = 0.95  # of every interval
RESAMPLES = 2000  # of the prompts
MIN_PROMPTS = 3  # with fewer prompts there are neither intervals nor lines
FALSE_DISCOVERY_RATE = 0.05  # Benjamini-Hochberg, over the contributions of an experiment and model

# Is there a direct path whose loss could be repaired?
MIN_LOSS_TO_NOISE = 10.0  # |mean D| / rms noise of the control `self`, same source, layer and component
MIN_LOSS_SHARE = 0.05  # |mean D| / (|mean D| + |mean R| + |mean N|)

# Is the ablation what it claims to be?
MAX_NORM_RATIO = 3.0  # median |replacement| / |original|; its inverse is the lower limit
MAX_REPLACEMENT_SHARE = 1 / 3  # mean u(replacement) / mean u(original)

# Can the rows be trusted? Relative to the rms of delta_ablate of the same source, layer and component.
LEDGER_TOLERANCE = 1e-3
LEDGER_TOLERANCE_16_BIT = (
    0.05  # each sum of the residual stream is rounded to 16 bits, the contributions are not
)
NOISE_TOLERANCE = 0.05
SELFTEST_TOLERANCE = 0.05
# In 16 bits engine and full forwards are two roundings of the same run, and the self-test's error is the largest of
# many: up to this multiple of the control's largest |delta_ablate| of the source, it is rounding. The noise floor's
# own tolerance (an rms against an rms) then decides whether effects drown in it.
SELFTEST_TO_NOISE_16_BIT = 2.0
