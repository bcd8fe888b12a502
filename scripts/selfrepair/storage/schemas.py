"""Schemas of the tokens and clean tables. The columns of the effects table are in `effects/columns.py`.

The column meanings are those of docs/glossary.md. Logits are centred over the vocabulary and taken before any soft-cap.
Changes are ablated minus clean. Layers count from 0.
"""

import pyarrow as pa

_NAME = pa.dictionary(pa.int32(), pa.string())
_PER_LAYER = pa.list_(pa.float32())

TOKENS = pa.schema(
    [
        ("prompt", pa.int32()),  # id within the data set: the record's place in the file, from 0
        ("split", pa.string()),  # source | store
        ("text", pa.string()),
        ("text_sha256", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("answer_ids", pa.list_(pa.int32())),  # null where the data set names no answer
        ("foil_ids", pa.list_(pa.int32())),  # null where the data set names no foil
    ]
)

CLEAN = pa.schema(
    [
        ("experiment", _NAME),
        ("model", _NAME),
        ("source", _NAME),
        ("prompt", pa.int32()),
        ("n_tokens", pa.int32()),
        ("target", pa.int32()),
        ("targets", pa.list_(pa.int32())),  # with `read: every`, of every position that is read; else null
        ("target_text", pa.string()),
        ("target_probability", pa.float32()),
        ("correct", pa.bool_()),
        ("clean_logit", pa.float32()),
        ("sigma", pa.float32()),
        ("embedding_effect", pa.float32()),
        ("unembed_attn", _PER_LAYER),
        ("unembed_mlp", _PER_LAYER),
        ("unembed_own_norm_attn", _PER_LAYER),
        ("unembed_own_norm_mlp", _PER_LAYER),
        ("closure_error", pa.float32()),  # |z^L - z^0 - sum of contributions| / |z^L|
        ("readout_error", pa.float32()),  # clean_logit against the model's own centred logit, in logits
    ]
)

MANIFEST = pa.schema(
    [
        ("experiment", _NAME),
        ("model", _NAME),
        ("source", _NAME),
        ("ablation", _NAME),
        ("layer", pa.int16()),
        ("path", pa.string()),  # relative to the directory of the run
        ("content_sha256", pa.string()),  # the digest in the cell's metadata
        # The cell's other files and their digests; null where the experiment has none.
        ("averages_path", pa.string()),
        ("averages_sha256", pa.string()),
        ("selections_path", pa.string()),
        ("selections_sha256", pa.string()),
        ("downstream_heads_path", pa.string()),
        ("downstream_heads_sha256", pa.string()),
    ]
)
