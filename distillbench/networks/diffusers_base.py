"""What the backbones around diffusers models share: config, taps, a head for the log-variance, surgery and adapters.

The config carries the diffusers model's own config as a plain dict, so that `to_config`, `build` and a state dict bring everything
back. diffusers and peft are imported where a network is built, never with this module. Features are read by forward hooks; to stop
at the deepest tap its hook raises, and `forward` catches: that works under autograd and torch.func.jvp, and torch.compile breaks
its graph there. A head for the log-variance sits on the time embedding, outside the diffusers model.
"""

from __future__ import annotations

import inspect
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..conditions import Conditions
from ..errors import UsageError, unknown
from .backbone import WITHOUT_ADAPTERS, Backbone, BackboneConfig, Output
from .diffusers_tools import add_peft_adapters, exact_in_double, import_diffusers, merge_peft_adapters
from .layers import generator_or_default, zero_linear

Hook = Callable[[nn.Module, Any, Any], Any]


@dataclass(frozen=True, kw_only=True)
class DiffusersConfig(BackboneConfig):
    """model: the config of the diffusers model.  width: its channels, the first of several (it follows from `model`).

    timestep_scale, discrete: the model's timestep is timestep_scale t, less 1 where it counts the rows of a table (`VPTable`).
    """

    model: dict[str, Any]
    timestep_scale: float = 1000.0
    discrete: bool = True


class _Stop(Exception):
    """The deepest tap was reached."""


class DiffusersBackbone(Backbone):
    """What the three kinds share. The prediction has the shape of x; the taps are maps (channels, h, w)."""

    config_type: ClassVar[type[BackboneConfig]] = DiffusersConfig
    model_class: ClassVar[str]
    config: DiffusersConfig

    def __init__(self, config: DiffusersConfig, generator: torch.Generator | None = None, *, model: nn.Module | None = None):
        super().__init__(config)
        self._refuse(config)
        generator = generator_or_default(generator)
        self.model: Any = exact_in_double(_built(self.model_class, config.model, generator) if model is None else model)
        if config.width != self._width():
            raise UsageError(f"network config: this {self.kind} is {self._width()} wide, not {config.width}")
        if config.guidance_input and model is None:
            self._close_guidance()
        self.log_variance = zero_linear(self._time_width(), 1) if config.log_variance else None
        if config.lora_rank:
            add_peft_adapters(self.model, config.lora_rank, generator, alpha=config.lora_alpha, targets=config.lora_targets)

    @classmethod
    def from_model(cls, model: Any, *, timestep_scale: float = 1000.0, discrete: bool = True) -> Self:
        """Take over a loaded diffusers model. Raises UsageError on another class and on inputs or outputs that do not fit."""
        if type(model).__name__ != cls.model_class:
            raise UsageError(f"a {cls.kind} network is a {cls.model_class}, not a {type(model).__name__}")
        plain = plain_config(model.config)
        wrapped = cls.__new__(cls)
        nn.Module.__init__(wrapped)
        wrapped.model = model
        config = DiffusersConfig(model=plain, width=wrapped._width(), classes=cls._classes(plain), timestep_scale=timestep_scale,
                                 discrete=discrete, guidance_input=cls._takes_guidance(plain))  # fmt: skip
        reference = next(model.parameters())
        return cls(config, model=model).to(reference.device, reference.dtype)

    @classmethod
    def _classes(cls, model: Mapping[str, Any]) -> int:
        return 0

    @classmethod
    def _takes_guidance(cls, model: Mapping[str, Any]) -> bool:
        return False

    def _refuse(self, config: DiffusersConfig) -> None:
        for name in ("second time", "guidance input"):
            if getattr(config, name.replace(" ", "_")) and name not in self.capabilities:
                raise UsageError(f"a {self.kind} network offers no {name}")

    def _width(self) -> int:
        return int(self.model.config["block_out_channels"][0])

    def _time_width(self) -> int:
        return int(self.model.time_embedding.linear_2.out_features)

    def _close_guidance(self) -> None:
        """Make the newly added guidance input an exact no-op."""

    @abstractmethod
    def _tap_modules(self) -> dict[str, nn.Module]:
        """The modules whose outputs are the taps."""

    def _time_module(self) -> nn.Module:
        return self.model.time_embedding

    @abstractmethod
    def _run(self, x: Tensor, timestep: Tensor, conditions: Conditions, guidance: Tensor | None) -> Tensor:
        """The model at its own timestep."""

    @property
    def tap_names(self) -> tuple[str, ...]:
        return tuple(self._tap_modules())

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype  # adapters have that of their base

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, *, second_time: Tensor | None = None,
                guidance: Tensor | float | None = None, taps: Sequence[str] = (), stop: bool = False) -> Output:  # fmt: skip
        self._check(second_time, guidance, taps, stop)
        # In float64 first, so that the timesteps of a table come out whole.
        timestep = t.double() * self.config.timestep_scale - float(self.config.discrete)
        if self.dtype != torch.float64:
            timestep = timestep.float()
        strength = None if guidance is None else torch.as_tensor(guidance, dtype=t.dtype, device=t.device).expand(len(x))
        features: dict[str, Tensor] = {}
        times: list[Tensor] = []
        with self._reading(features, times, tuple(dict.fromkeys(taps)), stop):
            try:
                prediction = self._run(x.to(self.dtype), timestep, conditions, strength)
            except _Stop:
                return Output(None, features)
        log_variance = None if self.log_variance is None else self.log_variance(times[0].detach()).squeeze(1)
        return Output(prediction[:, : x.shape[1]].to(x.dtype), features, log_variance)

    @contextmanager
    def _reading(self, features: dict[str, Tensor], times: list[Tensor], taps: tuple[str, ...], stop: bool) -> Iterator[None]:
        """While it lasts, hooks fill `features` from the taps and, for the log-variance, `times` with the time embedding."""

        def tapped(name: str) -> Hook:
            def hook(_module: nn.Module, _inputs: Any, out: Any) -> None:
                features[name] = self._as_map(name, out[0] if isinstance(out, tuple) else out)
                if stop and len(features) == len(taps):
                    raise _Stop

            return hook

        def timed(_module: nn.Module, _inputs: Any, out: Any) -> None:
            times.append(out[1] if isinstance(out, tuple) else out)

        modules = self._tap_modules() if taps else {}
        handles = [modules[name].register_forward_hook(tapped(name)) for name in taps]
        if self.log_variance is not None:
            handles.append(self._time_module().register_forward_hook(timed))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _as_map(self, name: str, h: Tensor) -> Tensor:
        return h

    def merged(self) -> Self:
        plain = self._placed(type(self)(replace(self.config, **WITHOUT_ADAPTERS)))
        plain.load_state_dict(merge_peft_adapters(self))
        return plain

    def _rebuilt(self, generator: torch.Generator | None = None, **changes: Any) -> Self:
        if changes.get("guidance_input") and not self.config.guidance_input:
            changes["model"] = {**self.config.model, **self._guided_model()}
        new = self._placed(type(self)(replace(self.config, **changes), generator))
        mine, state = self.state_dict(), new.state_dict()
        for key in state:
            for source in self._sources(key):
                if source in mine:
                    state[key] = mine[source]
        new.load_state_dict(state)
        return new.train(self.training)

    def _guided_model(self) -> dict[str, Any]:
        """What changes in the diffusers model's config when it takes the guidance scale."""
        return {}

    def _sources(self, key: str) -> tuple[str, ...]:
        """Where a weight of a rebuilt network may come from: adapters move the weights of their layers."""
        return (key, key.replace(".base_layer.", "."))


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers config as json gives it back, without its private entries (class, version, path)."""
    return json.loads(json.dumps({key: value for key, value in config.items() if not key.startswith("_")}))


def _built(model_class: str, config: Mapping[str, Any], generator: torch.Generator) -> nn.Module:
    """A diffusers model with initial weights from `generator` alone."""
    make = getattr(import_diffusers(), model_class)
    known = [name for name in inspect.signature(make.__init__).parameters if name != "self"]
    for name in config:
        if name not in known:
            raise unknown(f"field of a {model_class}'s config", str(name), known)
    seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_(generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            return make(**config)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError) as error:
            raise UsageError(f"no {model_class} can be made of this config ({error})") from None
