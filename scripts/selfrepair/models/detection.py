"""Find the adapter of a model by observing a few short forward passes in which every layer reads a random stream.

1. `trace` records what every layer reads and returns and what its submodules return.
2. `decomposition` finds the two submodules of each layer whose outputs add up to the layer's change of the stream.
3. `roles` finds which of the two mixes positions, and whether they run in parallel.
4. `heads` finds the projection that makes the attention contribution from the query heads.
5. `unembedding` fits the final norm, the logit scale and the soft-cap.
A model for which one of these identities does not hold is refused with the measured error.
"""

import logging

import torch
from transformers import PreTrainedModel

from selfrepair.models.adapter import (
    Adapter,
    LayerAdapter,
    require_decoder_only,
    tolerance,
)
from selfrepair.models.decomposition import find_contributions, find_mixer, find_trim
from selfrepair.models.heads import find_heads
from selfrepair.models.probes import probe_ids, random_streams
from selfrepair.models.roles import find_roles, require_one_mixer
from selfrepair.models.trace import find_layers, record
from selfrepair.models.unembedding import find_final_norm, find_head

log = logging.getLogger("selfrepair")


@torch.no_grad()
def detect(model: PreTrainedModel) -> Adapter:
    """Return the adapter of a causal language model.

    Raises NoDecompositionError, with the measured errors, if the method is not defined on the model.
    """
    name = type(model).__name__
    require_decoder_only(model.config, name)
    path, layers = find_layers(model, probe_ids(model))
    streams = random_streams(model, layers)
    trace = record(model, path, layers, streams)
    error = tolerance(model)
    pairs = find_contributions(model, layers, trace, streams, error)
    roles = find_roles(model, layers, [(pair.first.path, pair.second.path) for pair in pairs], streams)
    adapters = []
    for number, (layer, pair, role) in enumerate(zip(trace.layers, pairs, roles, strict=True)):
        require_one_mixer(role, (pair.first.path, pair.second.path), f"{name}, layer {number}")
        attn, mlp = (pair.first, pair.second) if role.first_mixes else (pair.second, pair.first)
        if role.inferred:
            log.warning(
                "layer %d: neither `%s` nor `%s` measurably mixes positions (relative changes %.1g and %.1g); their "
                "roles are taken from layers of the same kind",
                *(number, pair.first.path, pair.second.path, *role.changes),
            )
        mixer = find_mixer(layer, attn.path, mlp.path)
        adapters.append(
            LayerAdapter(
                attn=attn.path,
                mlp=mlp.path,
                multiplier=pair.multiplier,
                parallel=bool(role.parallel),  # unclear only for an MLP that adds nothing
                mixer=mixer.path if mixer else None,
                mixer_outputs=mixer.outputs if mixer else None,
                layer_outputs=layer.outputs,
                closure_error=pair.error,
            )
        )
    adapters = find_heads(model, layers, adapters, streams)
    norm_path, norm, norm_error = find_final_norm(model, trace, error, name)
    head = find_head(model, trace, norm, error, name)
    return Adapter(
        layers_path=path,
        layers=tuple(adapters),
        norm_path=norm_path,
        norm_kind=norm.kind,
        head_path=head.path,
        logit_scale=head.output_scale,
        head_input_scale=head.input_scale,
        softcap=head.softcap,
        d_model=trace.final.shape[-1],
        trim=find_trim(trace.layers[-1], layers[-1], adapters[-1]),
        norm_error=norm_error,
        head_error=head.error,
    )
