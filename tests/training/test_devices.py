"""Training and sampling on another device than the processor's, without one: on torch's device `meta`, which has shapes and no numbers.

An accelerator refuses operations between devices; `OneDevice` refuses them here. Numbers that are read back from the device are made up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distillbench.api import Batch, Conditions, Context, external
from distillbench.config import make_config
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.schedules import Flow
from distillbench.discovery import discover, find
from distillbench.networks.backbone import CAPABILITIES
from distillbench.networks.diffusers import Sana, UNet2DCondition
from distillbench.networks.diffusers_base import DiffusersConfig
from distillbench.networks.mlp import MLP, MLPConfig
from distillbench.networks.transformer import Transformer, TransformerConfig
from distillbench.tracks import get_track, mixture2d
from distillbench.training.meter import pass_cost
from distillbench.training.state import built
from toy_pipelines import CROSS, SANA, UNET

DEVICE = "meta"
ATEN = torch.ops.aten
BETWEEN_DEVICES = (ATEN.copy_.default, ATEN._to_copy.default)
INDEXING = (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default)
READS = (Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__bool__)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class OneDevice(TorchDispatchMode):
    """Refuses what an accelerator refuses: tensors of two devices in one operation. Numbers () and indices may lie on the processor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
        if func in INDEXING:
            seen = [args[0], *(index for index in args[1] if index is not None and index.device.type != "cpu")]
        if func not in BETWEEN_DEVICES and len({x.device.type for x in seen}) > 1:
            raise RuntimeError(f"{func} between two devices")
        return func(*args, **(kwargs or {}))


class MadeUp(TorchFunctionMode):
    """Numbers that are read from the device are 1/2, or 0 where they are whole."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.device.type == DEVICE:
            if func in READS:
                return func(made_up(x), *args[1:], **kwargs)
            if func is Tensor.cpu or (func is Tensor.to and "cpu" in (*args[1:], *kwargs.values())):
                return made_up(x)
        return func(*args, **kwargs)


def made_up(x: Tensor) -> Tensor:
    return torch.full(x.shape, 0.5, device="cpu").to(x.dtype)


class RandomSource:
    """Noise for data, and conditions that both kinds of network understand."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def conditions(self, n: int, generator: torch.Generator) -> Conditions:
        fields = {"label": torch.randint(4, (n,), generator=generator), "tokens": torch.randn(n, 3, CROSS, generator=generator),
                  "mask": torch.ones(n, 3, dtype=torch.int64)}  # fmt: skip
        return Conditions(fields, {"label": 4, "tokens": torch.zeros(3, CROSS), "mask": torch.ones(3, dtype=torch.int64)})

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Conditions]:
        return torch.randn(n, *self.shape, generator=generator), self.conditions(n, generator)


def teacher(kind: str) -> tuple[Denoiser, tuple[int, ...]]:
    """Untrained, on the processor, with the shape of its data."""
    if kind == "mlp":
        network: Any = MLP(MLPConfig(width=16, classes=4, depth=2, dimension=2))
    elif kind == "transformer":
        network = Transformer(TransformerConfig(width=16, classes=4, channels=1, size=8, patch=4, depth=2, heads=2, frequencies=4))
    else:
        made, model = (Sana, SANA) if kind == "sana" else (UNet2DCondition, UNET)
        width = 16 if kind == "sana" else 8
        network = made(DiffusersConfig(model=dict(model), width=width, classes=0, discrete=kind != "sana"), seeded(0))
    shape = {"mlp": (2,), "transformer": (1, 8, 8)}.get(kind) or (UNET["in_channels"], UNET["sample_size"], UNET["sample_size"])
    guide = Denoiser(network, Flow(), "velocity")
    external(guide)
    return guide, shape


@contextmanager
def elsewhere() -> Iterator[None]:
    """Operations whose output's size depends on numbers keep all of them."""
    with fx_config.patch(meta_nonzero_assume_all_nonzero=True), OneDevice(), MadeUp():
        yield


@pytest.mark.parametrize("kind", ["mlp", "transformer", "unet", "sana"])
@pytest.mark.parametrize("name", sorted(discover()))
def test_every_turn_and_the_student_stay_on_the_device(name, kind):
    guide, shape = teacher(kind)
    guide.to(DEVICE)
    found = find(name)
    needs = CAPABILITIES.intersection(found.info.needs)
    if not needs <= guide.network.capabilities:
        pytest.skip(f"a {kind} network offers no {', '.join(needs - guide.network.capabilities)}")
    method_class, source = found.load(), RandomSource(shape)
    steps = (2,) if found.info.per_step else tuple(n for n in (1, 2, 4) if n in found.info.steps)
    with elsewhere():
        context = Context(guide, shape, steps, 0, DEVICE, 8, 2.0, source.conditions(4, seeded(1)))
        method = built(method_class(make_config(method_class.Config, name, {})), context)
        for stage in method.stages():
            for turn in stage.turns:
                batch = Batch(size=8, count=0, progress=0.5, source=source, generator=seeded(2), device=DEVICE)
                for module in turn.updates.values():
                    module.requires_grad_(True)
                losses = turn.loss(batch)
                if losses is not None:
                    (losses if isinstance(losses, Tensor) else sum(losses.values())).backward()
        made = method.distilled().generate(source.conditions(4, seeded(3)), steps=steps[0], seeds=[0, 1, 2, 3])
    assert made.x.device.type == DEVICE


@pytest.mark.parametrize("kind", ["mlp", "transformer", "unet", "sana"])
def test_a_pass_costs_the_same_on_any_device(kind):
    guide, shape = teacher(kind)
    catalog = RandomSource(shape).conditions(4, seeded(1))
    here = pass_cost(guide, shape, catalog)
    with OneDevice():
        assert pass_cost(guide.to(DEVICE), shape, catalog) == here > 0


def test_scores_do_not_depend_on_where_the_teacher_is(monkeypatch, few_samples):
    track = get_track("mixture2d")
    x = track.truth()
    before = [score.value for score in track.score(x)]
    mixture2d._teacher_samples.cache_clear()
    mixture2d._metrics.cache_clear()
    moved = track.teacher().copy().to(DEVICE)
    monkeypatch.setattr(mixture2d, "_teacher", lambda: moved)
    assert [score.value for score in track.score(x)] == before
