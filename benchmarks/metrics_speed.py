"""Fréchet distance, kernel distance, precision and recall: this package against clean-fid, torchmetrics and torch-fidelity.

    python benchmarks/metrics_speed.py --threads 2

All get the same synthetic features. The others average the kernel distance over 100 random subsets of 1,000 rows by default, so that
their values scatter about the exact one; all other differences are rounding. Packages that cannot be imported are named and left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from distillbench.torchvision_repair import repair_torchvision

PACKAGES = {"clean-fid": "cleanfid.fid", "torchmetrics": "torchmetrics.image.fid", "torch-fidelity": "torch_fidelity"}


def load_published() -> tuple[dict[str, Any], dict[str, str]]:
    """The packages that can be imported, by name, and for each of the others the reason why not."""
    modules, missing = {}, {}
    repair_torchvision()
    for name, module in PACKAGES.items():
        try:
            modules[name] = importlib.import_module(module)
        except Exception as error:  # a broken install raises anything
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return modules, missing


Routine = Callable[[np.ndarray, np.ndarray], float]


def frechet_routines(modules: dict[str, Any]) -> dict[str, Routine]:
    """From features to the distance, the way each package does it."""
    routines: dict[str, Routine] = {}
    if "clean-fid" in modules:
        routines["clean-fid"] = lambda a, b: float(modules["clean-fid"].fid_from_feats(a, b))
    if "torchmetrics" in modules:
        routines["torchmetrics"] = _torchmetrics("torchmetrics.image.fid", "FrechetInceptionDistance")
    if "torch-fidelity" in modules:
        routines["torch-fidelity"] = _torch_fidelity_frechet
    return routines


def kernel_routines(modules: dict[str, Any], subsets: int = 100, size: int = 1000) -> dict[str, Routine]:
    """Mean kernel distance over random subsets; one subset of all rows gives the exact value."""
    routines: dict[str, Routine] = {}
    if "clean-fid" in modules:
        routines["clean-fid"] = lambda a, b: modules["clean-fid"].kernel_distance(a, b, num_subsets=subsets, max_subset_size=size)
    if "torchmetrics" in modules:
        routines["torchmetrics"] = _torchmetrics("torchmetrics.image.kid", "KernelInceptionDistance", subsets=subsets, subset_size=size)
    if "torch-fidelity" in modules:
        routines["torch-fidelity"] = lambda a, b: _torch_fidelity_kernel(a, b, subsets, size)
    return routines


def precision_routines(modules: dict[str, Any]) -> dict[str, Callable[[np.ndarray, np.ndarray], tuple[float, float]]]:
    """Precision and recall, k = 3; clean-fid and torchmetrics have none."""
    return {"torch-fidelity": _torch_fidelity_precision} if "torch-fidelity" in modules else {}


def _torchmetrics(module: str, name: str, **options: Any) -> Routine:
    """A torchmetrics metric whose feature network hands its input through."""
    import torch

    class Features(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.num_features = width

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    def run(generated: np.ndarray, reference: np.ndarray) -> float:
        metric = getattr(importlib.import_module(module), name)(feature=Features(generated.shape[1]), **options)
        metric.set_dtype(torch.float64)
        metric.update(torch.from_numpy(reference), real=True)
        metric.update(torch.from_numpy(generated), real=False)
        value = metric.compute()
        return float(value[0] if isinstance(value, tuple) else value)

    return run


def _torch_fidelity_frechet(generated: np.ndarray, reference: np.ndarray) -> float:
    import torch
    from torch_fidelity import metric_fid

    first, second = (metric_fid.fid_features_to_statistics(torch.from_numpy(rows)) for rows in (generated, reference))
    return float(metric_fid.fid_statistics_to_metric(first, second, False)[metric_fid.KEY_METRIC_FID])


def _torch_fidelity_kernel(generated: np.ndarray, reference: np.ndarray, subsets: int, size: int) -> float:
    import torch
    from torch_fidelity import metric_kid

    first, second = torch.from_numpy(generated), torch.from_numpy(reference)
    result = metric_kid.kid_features_to_metric(first, second, kid_subsets=subsets, kid_subset_size=size, verbose=False)
    return float(result[metric_kid.KEY_METRIC_KID_MEAN])


def _torch_fidelity_precision(generated: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    import torch
    from torch_fidelity import metric_prc

    result = metric_prc.prc_features_to_metric(torch.from_numpy(generated), torch.from_numpy(reference), verbose=False)
    return float(result[metric_prc.KEY_METRIC_PRECISION]), float(result[metric_prc.KEY_METRIC_RECALL])


def features(n: int, d: int, seed: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of correlated, nonnegative, skewed rows, as pooled activations are; the first set is shifted a little."""
    generator = np.random.default_rng(seed)
    scales = np.arange(1, d + 1) ** -0.5
    mixing = generator.standard_normal((d, d)) * scales[:, None]
    sets = []
    for shift in (0.1, 0.0):
        latent = generator.standard_normal((n, d)) + shift * scales
        sets.append((0.3 * np.maximum(latent @ mixing, 0.0)).astype(dtype))
    return sets[0], sets[1]


def timed(routines: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[list[float], list[float], Any]]:
    """Wall seconds, processor seconds and the last value of each; taken in turns, so that a drift of the machine hits all alike."""
    taken: dict[str, tuple[list[float], list[float], Any]] = {name: ([], [], None) for name in routines}
    for _ in range(repeats):
        for name, routine in routines.items():
            wall, processor = time.perf_counter(), time.process_time()
            value = routine()
            seconds, processor_seconds, _ = taken[name]
            seconds.append(time.perf_counter() - wall)
            processor_seconds.append(time.process_time() - processor)
            taken[name] = (seconds, processor_seconds, value)
    return taken


def machine(threads: str) -> str:
    """One paragraph: processor, cores, threads, versions."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    versions = []
    for name in ("numpy", "scipy", "torch", *PACKAGES):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    load = f", load average at the start {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    python = platform.python_version()
    return f"{model}, {os.cpu_count()} cores, {threads} threads{load}\nPython {python}, {', '.join(versions)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--d", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64", help="of the features; ours computes in float64")
    parser.add_argument("--threads", type=int, default=None, help="of torch; set OMP_NUM_THREADS for numpy")
    options = parser.parse_args()
    from distillbench.metrics.frechet import frechet_distance
    from distillbench.metrics.kernel import kernel_distance
    from distillbench.metrics.prdc import prdc

    modules, missing = load_published()
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    print(machine(f"{options.threads or 'default'} torch, {os.environ.get('OMP_NUM_THREADS', 'default')} numpy"))
    print(f"n = {options.n} in each set, d = {options.d}, {options.dtype}, median of {options.repeats}, seed {options.seed}")
    for name, reason in missing.items():
        print(f"left out: {name} ({reason})")
    np.random.seed(options.seed)  # clean-fid draws its subsets from the global state
    generated, reference = features(options.n, options.d, options.seed, options.dtype)
    size = min(1000, options.n)
    tasks: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
        ("frechet", frechet_distance, frechet_routines(modules)),
        (f"kernel (theirs: 100 subsets of {size})", kernel_distance, kernel_routines(modules, 100, size)),
        ("precision, recall (ours: with density, coverage)", lambda a, b: prdc(a, b)[:2], precision_routines(modules)),
    ]
    print(f"\n{'':16}{'wall s':>9}{'(min, max)':>18}{'ratio':>7}{'processor s':>13}{'ratio':>7}  {'value':28}{'rel. difference':>15}")
    for metric, ours, others in tasks:
        print(metric)
        calls = {name: partial(routine, generated, reference) for name, routine in {"distillbench": ours, **others}.items()}
        taken = timed(calls, options.repeats)
        wall, processor = (statistics.median(seconds) for seconds in taken["distillbench"][:2])
        expected = np.atleast_1d(taken["distillbench"][2])
        for name, (seconds, processor_seconds, value) in taken.items():
            middle, used = statistics.median(seconds), statistics.median(processor_seconds)
            gap = float(np.max(np.abs(value - expected) / np.maximum(np.abs(expected), 1e-300)))
            shown = ", ".join(f"{number:.10g}" for number in np.atleast_1d(value))
            spread = f"({min(seconds):.2f}, {max(seconds):.2f})"
            print(
                f"  {name:14}{middle:9.2f}{spread:>18}{middle / wall:7.1f}{used:13.2f}{used / processor:7.1f}  {shown:28}{gap:15.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
