"""Fit what lies between the last layer and the logits: final norm, input scale, head, logit scale, soft-cap."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfrepair.models.adapter import Adapter, NoDecompositionError, snapped, text_config
from selfrepair.models.norms import FinalNorm, NotANormError, no_norm, probe
from selfrepair.models.trace import Trace


def final_norm(model: PreTrainedModel, adapter: Adapter) -> FinalNorm:
    """Return the model's final norm as gain, bias, eps and centring."""
    if adapter.norm_path is None:
        return no_norm(adapter.d_model)
    return probe(model.get_submodule(adapter.norm_path), adapter.d_model)


def find_final_norm(
    model: PreTrainedModel, trace: Trace, error: float, name: str
) -> tuple[str | None, FinalNorm, float]:
    """Return path, fit and relative error of the norm that reads the stream after the last layer.

    The path is None if the head reads the stream itself. `error` is the largest relative error accepted.
    Raises NoDecompositionError if the module is neither an RMS norm nor a LayerNorm.
    """
    readers = [call for call in trace.after_stack if _same(call.read, trace.final)]
    d_model = trace.final.shape[-1]
    if not readers or readers[0].module is model.get_output_embeddings():
        return None, no_norm(d_model), 0.0
    call = readers[0]
    try:
        norm = probe(call.module, d_model)
    except NotANormError as reason:
        raise NoDecompositionError(
            f"the module after the last layer ({call.path}) is not a known norm: {reason}",
            where=name,
            remedy="use a model that ends in an RMS or layer norm.",
        ) from reason
    predicted = norm(call.read.double())
    mismatch = float((predicted - call.returned.double()).norm() / call.returned.double().norm())
    if mismatch > error:
        raise NoDecompositionError(
            f"the final norm {call.path} is off by {mismatch:.2g} from the {norm.kind} fitted to it",
            where=name,
            remedy="use a model that ends in an RMS or layer norm.",
        )
    return call.path, norm, mismatch


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape[-1] != other.shape[-1] or one.dim() != other.dim():
        return False
    return torch.equal(one[:, -1], other[:, -1])


@dataclass(frozen=True)
class Head:
    """The unembedding: logits = cap(output_scale * head(input_scale * final norm))."""

    path: str
    output_scale: float
    input_scale: float
    softcap: float | None
    error: float  # relative error of the head's input


def find_head(model: PreTrainedModel, trace: Trace, norm: FinalNorm, error: float, name: str) -> Head:
    """Return the unembedding and its scales.

    Raises NoDecompositionError if the logits are not a scaled or soft-capped linear map of the final norm.
    """
    head = model.get_output_embeddings()
    calls = [call for call in trace.after_stack if call.module is head]
    if head is None or not calls or getattr(head, "weight", None) is None:
        raise NoDecompositionError(
            "has no linear unembedding that reads the final norm",
            where=name,
            remedy="use a causal language model.",
        )
    call = calls[-1]
    expected = norm(trace.final.double())[:, -1]
    if call.read.shape[-1] != expected.shape[-1]:
        raise NoDecompositionError(
            f"the unembedding reads {call.read.shape[-1]} dimensions, the residual stream has {expected.shape[-1]}",
            where=name,
            remedy="use a model whose unembedding reads the residual stream itself.",
        )
    # Some models scale the hidden state before the head: the factor joins the logit scale.
    actual = call.read[:, -1].double()
    inner = float((actual * expected).sum() / expected.square().sum())
    head_error = float((actual - inner * expected).norm() / actual.norm())
    if head_error > error:
        raise NoDecompositionError(
            f"the unembedding does not read the final norm (off by {head_error:.2g})",
            where=name,
            remedy="use a model whose unembedding reads the final norm.",
        )
    logits, raw = trace.logits[:, -1].double(), call.returned[:, -1].double()
    outer = float((logits * raw).sum() / raw.square().sum())
    largest = float(logits.abs().max())
    linear_error = float((logits - outer * raw).abs().max()) / largest
    # A soft-cap is almost linear for logits much smaller than the cap: take the better of the two fits.
    cap, cap_error = _softcap(getattr(text_config(model), "final_logit_softcapping", None), raw, logits)
    if min(linear_error, cap_error) < 10 * error:
        if cap is not None and cap_error < linear_error:
            return Head(call.path, 1.0, snapped(inner, error), float(cap), head_error)
        return Head(call.path, snapped(outer, error), snapped(inner, error), None, head_error)
    raise NoDecompositionError(
        f"the logits are not a scaled or soft-capped unembedding (off by {min(linear_error, cap_error):.2g})",
        where=name,
        remedy="use another model.",
    )


def _softcap(configured: float | None, raw: Tensor, logits: Tensor) -> tuple[float | None, float]:
    """Return the cap of logits = cap * tanh(raw / cap), configured or fitted, and its largest relative error."""
    largest = raw.abs().argmax()
    top, capped = float(raw.flatten()[largest].abs()), float(logits.flatten()[largest].abs())
    candidates = [float(configured)] if configured else []
    if 0 < capped < top:
        low, high = capped, 1e4 * top  # cap * tanh(top / cap) grows with the cap
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if middle * math.tanh(top / middle) < capped else (low, middle)
        candidates += [snapped(high, 1e-2), high]
    if not candidates:
        return None, float("inf")
    errors = [
        float((cap * torch.tanh(raw / cap) - logits).abs().max()) / float(logits.abs().max())
        for cap in candidates
    ]
    return min(zip(candidates, errors, strict=True), key=lambda fit: fit[1])
