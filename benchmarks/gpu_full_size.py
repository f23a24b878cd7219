"""One optimiser step of four methods on networks of full size with random weights, in bfloat16, on a GPU.

    python benchmarks/gpu_full_size.py [--rounds 5] [--only dmd2,scm] [--out benchmarks/gpu_full_size.txt]

dmd2 and swiftbrush on Stable Diffusion 1.5's U-Net (64 x 64 latents of 512 px), scm and sana_sprint on SANA-0.6B's transformer (32 x 32
latents of 1024 px). Latents and embeddings are random: text encoders and autoencoders take no part in these losses. The step is the
method's own cycle of turns, every update of which is made once or as often as it says, with its optimisers and averages; weights and
activations are bfloat16, the heads' weights float32. The batch is doubled until memory ends. Without a GPU it says so, ends, and leaves
the table of the last run as it is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness_speed import Plain

from distillbench.api import Conditions, Context, external
from distillbench.config import make_config
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.schedules import Flow, VPTable
from distillbench.discovery import find
from distillbench.latency_stages import largest_batch
from distillbench.networks.diffusers import Sana, UNet2DCondition
from distillbench.networks.diffusers_base import DiffusersConfig
from distillbench.training.costs import count
from distillbench.training.state import built

UNET = {"sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
        "cross_attention_dim": 768, "attention_head_dim": 8}  # fmt: skip
SANA = {"sample_size": 32, "in_channels": 32, "out_channels": 32, "num_layers": 28, "num_attention_heads": 36, "attention_head_dim": 32,
        "num_cross_attention_heads": 16, "cross_attention_head_dim": 72, "cross_attention_dim": 1152, "caption_channels": 2304,
        "mlp_ratio": 2.5}  # fmt: skip
MOST = 256
POOL = 64  # latents and prompts that there are
SIDE = 8192  # of the square matrices whose product says what the card can do


@dataclass(frozen=True)
class Size:
    """A family of networks. tokens: (length, width) of an embedded prompt.  guidance: of the teacher."""

    name: str
    backbone: type[Any]
    model: Mapping[str, Any]
    tokens: tuple[int, int]
    guidance: float

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.model["in_channels"], self.model["sample_size"], self.model["sample_size"])


SD15 = Size("SD 1.5", UNet2DCondition, UNET, (77, 768), 7.5)
SANA06 = Size("SANA 0.6B", Sana, SANA, (300, 2304), 4.5)
ROWS: tuple[tuple[str, Size], ...] = (("dmd2", SD15), ("swiftbrush", SD15), ("scm", SANA06), ("sana_sprint", SANA06))


class RandomSource:
    """Random latents and embeddings, drawn from a few that lie on the device as a store of real ones would; implements `api.Source`."""

    def __init__(self, size: Size, device: str, dtype: torch.dtype):
        length, width = size.tokens
        generator = torch.Generator(device).manual_seed(0)
        self._latents = torch.randn(POOL, *size.shape, generator=generator, device=device)
        tokens = torch.randn(POOL, length, width, generator=generator, device=device).to(dtype)
        null = torch.zeros(length, width, device=device, dtype=dtype)
        ones = torch.ones(POOL, length, dtype=torch.int64, device=device)
        self._conditions = Conditions({"tokens": tokens, "mask": ones}, {"tokens": null, "mask": ones[0]})

    def conditions(self, n: int, generator: torch.Generator) -> Conditions:
        return self._conditions[self._rows(n, generator)]

    def draw(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, Conditions]:
        rows = self._rows(n, generator)
        return self._latents[rows], self._conditions[rows]

    def _rows(self, n: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(POOL, (n,), generator=generator).to(self._latents.device)


def random_teacher(size: Size, device: str, dtype: torch.dtype) -> Denoiser:
    """A frozen denoiser with initial weights: eps on Stable Diffusion's table, or the velocity of a flow of shift 3."""
    flow = size.backbone is Sana
    options: dict[str, Any] = {"timestep_scale": 1000.0, "discrete": not flow}
    width = size.model["num_attention_heads"] * size.model["attention_head_dim"] if flow else size.model["block_out_channels"][0]
    config = DiffusersConfig(model=dict(size.model), width=width, classes=0, **options)
    network = size.backbone(config, torch.Generator().manual_seed(0)).to(device, dtype)
    if flow:
        return external(Denoiser(network, Flow(), "velocity", path=Flow(3.0)))  # type: ignore[return-value]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    return external(Denoiser(network, VPTable(tuple((1 - betas).cumprod(0).tolist())), "eps"))  # type: ignore[return-value]


def stepper(method: str, size: Size, batch: int, device: str, dtype: torch.dtype, settings: Mapping[str, Any] | None = None) -> Plain:
    """The turns of a freshly built method around a random teacher."""
    found = find(method)
    method_class = found.load()
    values = {**(settings or {})}
    steps = (1,) if found.info.per_step else tuple(n for n in (1, 2, 4) if n in found.info.steps)
    teacher = random_teacher(size, device, dtype)
    source = RandomSource(size, device, dtype)
    catalog = source.conditions(1, torch.Generator().manual_seed(0))
    context = Context(teacher, size.shape, steps, 0, device, batch, size.guidance, catalog)
    instance = built(method_class(make_config(method_class.Config, method, values)), context)
    return Plain(instance, source, batch, device, None if dtype == torch.float32 else dtype)


def matrix_rate(device: str, dtype: torch.dtype, side: int = SIDE, rounds: int = 20) -> float:
    """Multiply-adds a second of the product of two square matrices: the median of `rounds`."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return side**3 / statistics.median(timed(lambda: a @ b, device, rounds, warm_up=5))


def timed(call: Callable[[], Any], device: str, rounds: int, warm_up: int = 2) -> list[float]:
    """Seconds of each call, the device idle before and after."""
    seconds = []
    for number in range(warm_up + rounds):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        if number >= warm_up:
            seconds.append(time.perf_counter() - start)
    return seconds


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Measured:
    """One row: the largest batch, seconds a cycle, examples a second over all turns, peak memory, share of the matrix rate."""

    batch: int
    seconds: float
    images_per_second: float
    peak_gb: float
    share: float


def measure(method: str, size: Size, *, device: str, dtype: torch.dtype, rate: float, rounds: int = 5, most: int = MOST,
            settings: Mapping[str, Any] | None = None) -> Measured:  # fmt: skip
    """Build once, find the batch that fits, count a cycle, then time it. rate: what `matrix_rate` said."""
    plain = stepper(method, size, 1, device, dtype, settings)

    def cycle(batch: int | None = None) -> None:
        plain.size = plain.size if batch is None else batch
        try:
            plain.cycle(0.5)
        except BaseException:
            for optimizer in plain.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            raise

    cycle(1)  # optimisers make their state
    plain.size = largest_batch(cycle, most)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    before, macs = plain.examples, count(cycle).matmul
    examples = plain.examples - before
    seconds = statistics.median(timed(cycle, device, rounds))
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.startswith("cuda") else float("nan")
    return Measured(plain.size, seconds, examples / seconds, peak, macs / seconds / rate)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(method for method, _ in ROWS), metavar="A,B", help="methods (default: all four)")
    parser.add_argument("--out", type=Path, help="a file for the table too; a row is written when it is there")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_full_size: no GPU here; nothing was measured")
        return 0
    if options.out:
        options.out.write_text("")

    def tell(line: str) -> None:
        print(line, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(line + "\n")

    device, dtype = "cuda", torch.bfloat16
    rate = matrix_rate(device, dtype)
    tell(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {dtype}; matrix products of {SIDE}: {2 * rate / 1e12:.0f} TFLOP/s")
    tell(f"{'method':<14}{'network':<12}{'batch':>6}{'ms a cycle':>12}{'images/s':>10}{'peak GB':>9}{'of matrix rate':>16}")
    for method, size in ROWS:
        if method in options.only.split(","):
            found = measure(method, size, device=device, dtype=dtype, rate=rate, rounds=options.rounds)
            tell(f"{method:<14}{size.name:<12}{found.batch:>6}{found.seconds * 1e3:>12.1f}{found.images_per_second:>10.1f}"
                 f"{found.peak_gb:>9.1f}{found.share:>15.1%}")  # fmt: skip
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
