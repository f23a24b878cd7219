"""The meter: what each turn costs, exact and cheap.

Hooks write a trace of each turn: which network ran, on which shapes, with which gradient flags. An unseen (turn, trace) is
replayed once under `costs.Counting` and its price is stored; a seen one adds its price. A turn is pure given its batch and the
weights, so the replay computes the same graph. Work turns may append to files, so they are counted as they run, never replayed.
An audit repeats the exact count now and then, and stops the run when a trace hides more than 1 % of difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..conditions import Conditions
from ..errors import MeterError
from ..networks.backbone import Backbone
from .costs import Counting, Macs

_AUDIT_TOLERANCE = 0.01


def _shape(x: Tensor) -> tuple:
    """The shape with the dimensions that vmap hides."""
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return tuple(x.shape)


def _describe(value: Any, wrapped: bool) -> Any:
    """What of an argument can change the cost of a call: shapes, gradient flags, switches and names, not numbers."""
    if isinstance(value, Tensor):
        return (_shape(value) if wrapped else value.shape, value.requires_grad)
    if isinstance(value, Conditions):
        return (len(value), *(v.shape if isinstance(v, Tensor) else len(v) for v in value.fields.values()))
    if isinstance(value, (bool, str, type(None))):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_describe(v, wrapped) for v in value)
    return type(value)


def networks_of(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules whose calls are traced: backbones wherever they hide, and every other module at the top of what holds none."""
    found: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> None:
        if isinstance(module, Backbone) or not any(isinstance(m, Backbone) for m in module.modules()):
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                for child in module.children():
                    visit(child)
            else:
                found.setdefault(id(module), module)
        else:
            for child in module.children():
                visit(child)

    for root in roots:
        visit(root)
    return list(found.values())


class Tracer:
    """Forward hooks on networks that write, while a turn runs, what could change its cost. They leave with `close`."""

    def __init__(self) -> None:
        self.entries: list[tuple] = []
        self._active = False
        self._handles: list[Any] = []

    def watch(self, networks: Iterable[nn.Module]) -> None:
        """Watch these networks and no others."""
        self.close()
        for index, network in enumerate(networks):
            self._handles.append(network.register_forward_pre_hook(self._hook(index), with_kwargs=True))

    def _hook(self, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._active:
                level = forward_ad._current_level
                wrapped = level >= 0 or torch._C._functorch.maybe_current_level() is not None  # type: ignore[attr-defined]
                described = [_describe(a, wrapped) for a in args]
                if kwargs:
                    described += [(k, _describe(v, wrapped)) for k, v in kwargs.items()]
                self.entries.append((index, torch.is_grad_enabled(), level, *described))

        return hook

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.entries = []
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class Meter:
    """Prices turns and adds them up in multiply-adds.

    exact=True counts every turn as it runs (slow: the reference that the tests compare with).
    """

    def __init__(self, *, exact: bool = False, audit_every: int = 2000):
        self.exact = exact
        self.audit_every = audit_every
        self.tracer = Tracer()
        self.prices: dict[tuple, Macs] = {}
        self.replays = 0

    def price(self, turn: tuple[int, str], count: int, replay: Callable[[], Any]) -> Macs:
        """The cost of the turn (stage number, name) just recorded; `replay` computes its losses and gradients once more."""
        key = (turn, *self.tracer.entries)
        known = self.prices.get(key)
        due = self.audit_every and count and count % self.audit_every == 0
        if known is not None and not due:
            return known
        with Counting() as counting:
            replay()
        self.replays += 1
        if known is not None and abs(counting.macs.total - known.total) > _AUDIT_TOLERANCE * known.total:
            raise MeterError(
                f"turn {turn[1]!r} costs {counting.macs.total} multiply-adds where {known.total} were charged, with the same calls of its"
                " networks: its cost depends on something else; move that computation into a network or make it a work turn"
            )
        self.prices[key] = counting.macs
        return counting.macs

    def close(self) -> None:
        self.tracer.close()


def pass_cost(teacher: Any, shape: tuple[int, ...], conditions: Conditions) -> int:
    """The unit of the budget: multiply-adds of one forward of the teacher's network on one example."""
    device = next(teacher.network.parameters()).device
    x, t = torch.zeros(1, *shape, device=device), torch.full((1,), 0.5, device=device)
    with torch.no_grad(), Counting() as counting:
        teacher.network(x, t, conditions[:1].to(device))
    return counting.macs.total
