"""Find the adapter of a model by observing one recorded forward pass and a few short ones.

1. `trace` records what every layer reads and returns and what its submodules return.
2. `decomposition` finds the two submodules of each layer whose outputs add up to the layer's change of the stream.
3. `roles` finds which of the two mixes positions, and whether they run in parallel.
4. `unembedding` fits the final norm, the logit scale and the soft-cap.
A model for which one of these identities does not hold is refused with the measured error.
"""

import torch
from transformers import PreTrainedModel

from selfrepair.models.adapter import (
    Adapter,
    LayerAdapter,
    NoDecompositionError,
    require_decoder_only,
    tolerance,
)
from selfrepair.models.decomposition import find_contributions, find_mixer, find_trim
from selfrepair.models.probes import probe_ids
from selfrepair.models.roles import find_roles
from selfrepair.models.trace import find_layers, record
from selfrepair.models.unembedding import find_final_norm, find_head


@torch.no_grad()
def detect(model: PreTrainedModel) -> Adapter:
    """Return the adapter of a causal language model.

    Raises NoDecompositionError, with the measured errors, if the method is not defined on the model.
    """
    name = type(model).__name__
    require_decoder_only(model.config, name)
    ids = probe_ids(model)
    path, layers = find_layers(model, ids)
    trace = record(model, path, layers, ids)
    error = tolerance(model)
    stream = tuple(trace.final.shape)
    if len(stream) != 3 or stream[:2] != tuple(ids.shape):
        raise NoDecompositionError(
            f"its layers pass on a tensor of shape {stream} for {ids.shape[1]} tokens: the residual stream is not one "
            "vector per token",
            where=name,
            remedy="use a model with one residual stream, and one position per token.",
        )
    pairs = [find_contributions(layer, error, f"{name}, layer {n}") for n, layer in enumerate(trace.layers)]
    roles = find_roles(model, layers, [(pair.first.path, pair.second.path) for pair in pairs], ids)
    adapters = []
    for number, (layer, pair, role) in enumerate(zip(trace.layers, pairs, roles, strict=True)):
        attn, mlp = (pair.first, pair.second) if role.first_mixes else (pair.second, pair.first)
        if role.first_mixes == role.second_mixes:
            both = "both" if role.first_mixes else "none"
            raise NoDecompositionError(
                f"{both} of the two contributions, {pair.first.path} and {pair.second.path}, mix positions: which of "
                "them is attention and which the MLP is not defined",
                where=f"{name}, layer {number}",
                remedy="use a model whose layers have one block that mixes positions and one that does not.",
            )
        mixer = find_mixer(layer, attn.path, mlp.path)
        adapters.append(
            LayerAdapter(
                attn=attn.path,
                mlp=mlp.path,
                multiplier=pair.multiplier,
                parallel=role.parallel,
                mixer=mixer.path if mixer else None,
                mixer_outputs=mixer.outputs if mixer else None,
                layer_outputs=layer.outputs,
                closure_error=pair.error,
            )
        )
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
