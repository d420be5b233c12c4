"""Other forwards for some of a model's modules, and their own again afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

Forward = Callable[..., Any]


@contextlib.contextmanager
def forwards_replaced(pairs: Iterable[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """While entered, calling a module runs its hooks around the forward that is paired with it."""
    # some libraries set a forward of their own on the instance
    before = [(module, forward, vars(module).get("forward")) for module, forward in pairs]
    try:
        for module, forward, _ in before:
            vars(module)["forward"] = forward
        yield
    finally:
        for module, _, own in before:
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own
