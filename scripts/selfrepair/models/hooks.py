"""Read and replace inputs and outputs of modules within a block."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class StopForward(Exception):  # control flow, not an error
    """A hook raises this to end a forward pass early."""


def first(output: Any) -> Tensor:
    """Return the hidden state of a module's output, which is a tensor or a tuple that begins with it."""
    return output[0] if isinstance(output, tuple | list) else output


def with_first(output: Any, replacement: Tensor) -> Any:
    """Return `output` with its hidden state replaced, as a tensor or tuple like before."""
    return (replacement, *output[1:]) if isinstance(output, tuple | list) else replacement


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden state among the arguments of a layer."""
    return args[0] if args else kwargs["hidden_states"]


def with_hidden_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with another hidden state."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


@contextlib.contextmanager
def on_output(pairs: Sequence[tuple[nn.Module, Callable[[Any], Any]]]) -> Iterator[None]:
    """Call `function(output)` after each module. Its result replaces the output, unless it is None."""
    handles = [
        module.register_forward_hook(lambda _m, _a, output, function=function: function(output))
        for module, function in pairs
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def on_input(pairs: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor | None]]]) -> Iterator[None]:
    """Call `function(hidden)` before each module. Its result replaces the hidden state, unless it is None."""

    def hook(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            replacement = function(hidden_argument(args, kwargs))
            return None if replacement is None else with_hidden_argument(args, kwargs, replacement)

        return before

    handles = [
        module.register_forward_pre_hook(hook(function), with_kwargs=True) for module, function in pairs
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def forward_replaced(pairs: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Run `function` instead of each module's own `forward`; hooks on the module still fire."""
    previous = [(module, module.__dict__.get("forward")) for module, _ in pairs]
    try:
        for module, function in pairs:
            module.__dict__["forward"] = function
        yield
    finally:
        for module, forward in reversed(previous):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def run_until_stopped(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Run a forward pass that a hook may end early with StopForward."""
    with torch.no_grad(), contextlib.suppress(StopForward):
        model(*args, **kwargs)
