"""What the diffusers backbones need of diffusers and peft: their import, exactness in double precision, and adapters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ..errors import UsageError
from ..torchvision_repair import repair_torchvision
from .lora import linear_layers

ADAPTER = "default"
When = Callable[[Tensor], bool]
Forward = Callable[[Any, Tensor], Tensor]


def import_diffusers() -> ModuleType:
    """The package diffusers. Raises UsageError where it is not installed."""
    repair_torchvision()
    try:
        import diffusers
    except ImportError as error:
        raise UsageError(f"this needs diffusers, transformers and peft ({error}): pip install 'distillbench[images]'") from None
    return diffusers


@contextmanager
def quiet() -> Iterator[None]:
    """diffusers and transformers without progress bars and warnings, as they were afterwards."""
    import_diffusers()
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs: tuple[Any, ...] = (diffusers_log, transformers_log)
    levels = [log.get_verbosity() for log in logs]
    bars = [log.is_progress_bar_enabled() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level, bar in zip(logs, levels, bars, strict=True):
            log.set_verbosity(level)
            if bar:
                log.enable_progress_bar()


def exact_in_double(model: Any) -> Any:
    """`model` itself, made to compute in float64 where it is fed float64, and to be differentiable in forward mode.

    diffusers takes timestep features, linear attention and RMS norms in float32 whatever the dtype, and PyTorch's rule for group norm
    wants a tangent that is contiguous. Elsewhere their own code runs, to the bit.
    """
    for module in model.modules():
        special = SPECIAL.get(type(module).__name__)
        if special is not None:
            kind: Any = type(module)
            module.__class__ = _with_special(kind, *special)
        elif type(getattr(module, "processor", None)).__name__ == "SanaLinearAttnProcessor2_0":
            module.processor = LinearAttention(module.processor)
    return model


@cache
def _with_special(kind: type[nn.Module], when: When, special: Forward) -> type[nn.Module]:
    """The same class, under the same name, with `special` for its forward where `when` holds."""
    plain = kind.forward

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return special(self, x) if when(x) else plain(self, x)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _is_double(x: Tensor) -> bool:
    return x.dtype == torch.float64


def _in_forward_mode(_x: Tensor) -> bool:
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None  # type: ignore[attr-defined]


def _timestep_features(layer: Any, t: Tensor) -> Tensor:
    """Sinusoids (n, num_channels) of t (n,), whose frequencies fall geometrically from 1 towards 1 / 10000."""
    half = layer.num_channels // 2
    at = torch.exp(-math.log(10000) * torch.arange(half, dtype=t.dtype, device=t.device) / (half - layer.downscale_freq_shift))
    angles = layer.scale * t[:, None] * at
    waves = (angles.cos(), angles.sin()) if layer.flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(waves, dim=1), (0, layer.num_channels % 2))


def _rms_norm(layer: Any, h: Tensor) -> Tensor:
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + layer.eps)
    h = h if layer.weight is None else h * layer.weight
    return h if layer.bias is None else h + layer.bias


def _group_norm(layer: Any, h: Tensor) -> Tensor:
    return F.group_norm(h.clone(memory_format=torch.contiguous_format), layer.num_groups, layer.weight, layer.bias, layer.eps)


SPECIAL: dict[str, tuple[When, Forward]] = {
    "Timesteps": (_is_double, _timestep_features),
    "RMSNorm": (_is_double, _rms_norm),
    "GroupNorm": (_in_forward_mode, _group_norm),
}


class LinearAttention:
    """SANA's attention processor: relu(q) (relu(k)^T v), normalised by relu(q) sum relu(k); the wrapped one below float64."""

    def __init__(self, plain: Any):
        self.plain = plain

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None) -> Tensor:  # fmt: skip
        if hidden_states.dtype != torch.float64:
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k = attn.to_q(hidden_states), attn.to_k(source)
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        q, k, v = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (F.relu(q), F.relu(k), attn.to_v(source)))
        mixed = q @ (k.transpose(2, 3) @ v)
        weight = q @ k.sum(2).unsqueeze(3)
        return attn.to_out[1](attn.to_out[0]((mixed / (weight + 1e-15)).transpose(1, 2).flatten(2)))


def add_peft_adapters(model: nn.Module, rank: int, generator: torch.Generator, *, alpha: float, targets: tuple[str, ...]) -> None:
    """Put peft's adapters on linear layers of `model`, in place, and turn all its other parameters into buffers.

    alpha: scaling is alpha / rank; 0: 1.  targets: as in `networks.lora.add_adapters`. Initial weights come from `generator`.
    """
    chosen = linear_layers(model, targets)
    if not chosen:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(model)})
        raise UsageError(f"no linear layer is named {' or '.join(targets)}; names here: {', '.join(known) or 'none'}")
    import_diffusers()
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=chosen, init_lora_weights=False)  # type: ignore[arg-type]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            layer: Any = module
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            with torch.no_grad():
                drawn = torch.rand(down.shape, generator=generator, device="cpu")
                down.copy_((2 * drawn - 1) * down.shape[1] ** -0.5)
                up.zero_()
    adapters = {id(p) for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in adapters:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())


def merge_peft_adapters(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain network that computes the same as this one with peft's adapters."""
    state = {key: value for key, value in network.state_dict().items() if ".lora_A." not in key and ".lora_B." not in key}
    for path, module in network.named_modules():
        if hasattr(module, "lora_A"):
            adapter: Any = module
            product = adapter.lora_B[ADAPTER].weight @ adapter.lora_A[ADAPTER].weight
            state[f"{path}.base_layer.weight"] = adapter.base_layer.weight + adapter.scaling[ADAPTER] * product.detach()
    return {key.replace(".base_layer.", "."): value for key, value in state.items()}


def peft_adapters(network: nn.Module) -> dict[str, Tensor]:
    """The adapters as diffusers writes them, "layer.lora_A.weight" and "layer.lora_B.weight", with their scaling in lora_B."""
    state = {}
    for path, module in network.named_modules():
        if hasattr(module, "lora_A"):
            adapter: Any = module
            state[f"{path}.lora_A.weight"] = adapter.lora_A[ADAPTER].weight.detach().contiguous()
            state[f"{path}.lora_B.weight"] = (adapter.scaling[ADAPTER] * adapter.lora_B[ADAPTER].weight).detach().contiguous()
    return state
