"""What an operator costs: multiply-adds of the mathematical graph, from one table of formulas.

PyTorch's own counter sees nothing in the fused CPU attention kernel, nor in elementwise work, which is most of an exact
score. Here every operator that computes is charged, and a fused kernel is charged what the same mathematics costs unfused, so that
the price does not depend on which kernel a device picks:

- matrix products and convolutions: one multiply-add per product term (a bias rides along free);
- attention: two products forward and four backward, its softmax and scalings as elementwise work, whatever kernel runs;
- everything else that computes: one per element of the largest tensor that it touches;
- views, copies, lookups, casts, creation, random numbers, and drawing data: nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..uncharged import charging

aten = torch.ops.aten


@dataclass(frozen=True)
class Macs:
    """Multiply-adds: of matrix products (attention and convolutions included) and of elementwise work."""

    matmul: int = 0
    elementwise: int = 0

    @property
    def total(self) -> int:
        return self.matmul + self.elementwise

    def __add__(self, other: Macs) -> Macs:
        return Macs(self.matmul + other.matmul, self.elementwise + other.elementwise)


def _mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> Macs:
    return Macs(matmul=a.shape[0] * a.shape[1] * b.shape[1])


def _addmm(_bias: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> Macs:
    return _mm(a, b)


def _bmm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> Macs:
    return Macs(matmul=a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2])


def _baddbmm(_bias: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> Macs:
    return _bmm(a, b)


def _mv(a: Tensor, *_: Any, **__: Any) -> Macs:
    return Macs(matmul=a.numel())


def _addmv(_bias: Tensor, a: Tensor, *_: Any, **__: Any) -> Macs:
    return Macs(matmul=a.numel())


def _linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Macs:
    return Macs(matmul=x.numel() * weight.shape[0])


def _conv_terms(positions: Tensor, weight: Tensor) -> int:
    """Product terms of a convolution: each element of `positions` (its output; its input if transposed) meets one filter."""
    return positions.numel() * math.prod(weight.shape[1:])


def _convolution(x: Tensor, weight: Tensor, _b: Any, _s: Any, _p: Any, _d: Any, transposed: bool, *_: Any, out: Tensor, **__: Any) -> Macs:
    return Macs(matmul=_conv_terms(x if transposed else out, weight))


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, _b: Any, _s: Any, _p: Any, _d: Any, transposed: bool, _o: Any,
                          _g: Any, mask: list[bool], **__: Any) -> Macs:  # fmt: skip
    products = _conv_terms(x if transposed else grad, weight) * (int(mask[0]) + int(mask[1]))
    return Macs(matmul=products, elementwise=grad.numel() if mask[2] else 0)


def _attention(q: Tensor, k: Tensor, v: Tensor, masked: bool, backward: bool) -> Macs:
    heads, lq, lk = math.prod(q.shape[:-2]), q.shape[-2], k.shape[-2]
    scores = heads * lq * lk
    products = scores * (q.shape[-1] + v.shape[-1])
    scaling = heads * (lq + lk) * q.shape[-1]
    mask = scores if masked and not backward else 0
    return Macs(matmul=products * (2 if backward else 1), elementwise=scores + scaling + mask)


def _attention_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Macs:
    masked = any(isinstance(a, Tensor) for a in args) or kwargs.get("attn_mask") is not None or kwargs.get("attn_bias") is not None
    return _attention(q, k, v, masked or any(a is True for a in args[1:]) or bool(kwargs.get("is_causal")), backward=False)


def _attention_backward(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Macs:
    return _attention(q, k, v, False, backward=True)


FORMULAS: dict[Any, Callable[..., Macs]] = {
    aten.mm: _mm, aten.addmm: _addmm, aten.bmm: _bmm, aten.baddbmm: _baddbmm, aten.mv: _mv, aten.addmv: _addmv, aten.dot: _mv,
    aten.linear: _linear, aten.convolution: _convolution, aten._convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
}  # fmt: skip
for _name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention", "fused_attention_overrideable"):
    for _suffix, _formula in (("", _attention_forward), ("_backward", _attention_backward)):
        if hasattr(aten, f"_scaled_dot_product_{_name}{_suffix}"):
            FORMULAS[getattr(aten, f"_scaled_dot_product_{_name}{_suffix}")] = _formula

# fmt: off
FREE_NAMES = (
    "clone", "copy_", "copy", "_to_copy", "to", "cat", "stack", "index", "index_select", "embedding", "gather", "scatter", "scatter_",
    "take", "take_along_dim", "slice_scatter", "select_scatter", "empty", "empty_like", "empty_strided", "new_empty",
    "new_empty_strided", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "new_zeros", "new_ones", "new_full",
    "scalar_tensor", "arange", "linspace", "eye", "fill_", "fill", "zero_", "zero", "normal_", "uniform_", "random_", "bernoulli_",
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "contiguous", "detach", "detach_", "lift_fresh", "lift", "alias",
    "resize_", "set_", "repeat", "flip", "roll", "constant_pad_nd", "_local_scalar_dense", "item", "is_same_size", "_unsafe_view",
    "_reshape_alias", "masked_select", "nonzero", "expand", "view", "unbind", "split", "triu", "tril", "slice_backward",
    "select_backward", "_fused_adam_", "_fused_adamw_", "equal", "is_nonzero", "_efficientzerotensor", "_has_same_storage_numel",
    "squeeze_", "unsqueeze_", "transpose_", "t_", "as_strided_",
)
# fmt: on
FREE = {getattr(aten, name) for name in FREE_NAMES if hasattr(aten, name)}


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [t for value in values for t in _tensors(value)]
    return []


def cost_of(func: Any, args: tuple, kwargs: dict, out: Any) -> Macs:
    """The cost of one call of an aten operator."""
    packet = func.overloadpacket
    if packet in FORMULAS:
        formula = FORMULAS[packet]
        return formula(*args, **kwargs, out=out) if formula is _convolution else formula(*args, **kwargs)
    if packet in FREE or func.is_view:
        return Macs()
    return Macs(elementwise=max((t.numel() for t in [*_tensors(args), *_tensors(out)]), default=0))


class Counting(TorchDispatchMode):
    """Counts every operator that runs while it is active, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = Macs()
        self.by_operator: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not charging():
            return out
        cost = cost_of(func, args, kwargs, out)
        self.macs += cost
        self.by_operator[str(func.overloadpacket)] += cost.total
        return out


def count(fn: Callable[[], Any]) -> Macs:
    """The exact cost of calling `fn` once."""
    with Counting() as counting:
        fn()
    return counting.macs
