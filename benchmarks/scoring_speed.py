"""Scoring two folders of images: this package against clean-fid with the same extractor.

    python benchmarks/scoring_speed.py [--n 2000] [--side 64] [--rounds 3] [--threads 2] [--workers 2]

Both read the same PNG files, both take the 112 features efflite0-b10@64 by the same network, and both make a Fréchet distance of them.
clean-fid gets its usual batches of 128, `--workers` processes that read, and no resizing, since the images have the network's size
already. The statistics are timed once more alone: on those features, and on as many rows of 2,048 synthetic ones (Inception's width),
where the matrix root is nearly all of clean-fid's time. In narrow features the two covariances, which every exact route needs, are a
large part of it; numpy's time for them is printed too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pairs import heading, line, machine, paired
from PIL import Image

from distillbench.data.image_folder import ImageFolder
from distillbench.metrics.extractors import EffLite0
from distillbench.metrics.frechet import frechet_distance
from distillbench.torchvision_repair import repair_torchvision

WIDE = 2048
FASTER = 7.0
NARROW_ROUNDS = 31  # of a few milliseconds each


def write_images(folder: Path, n: int, side: int, seed: int) -> None:
    """PNG files of smooth random colours with some noise on them: about as large as photographs of that side."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    for i in range(n):
        smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6, generator=generator), (side, side), mode="bicubic")[0]
        noisy = smooth + 0.03 * torch.randn(3, side, side, generator=generator)
        Image.fromarray((noisy.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")


def our_features(folder: Path, extractor: EffLite0) -> np.ndarray:
    images = ImageFolder(folder)
    found = torch.cat([extractor(batch.images) for batch in images.batches(64)])
    images.require()
    return found.double().numpy()


def clean_fid_features(folder: Path, extractor: EffLite0, workers: int) -> np.ndarray:
    """clean-fid's own reading and batching around the network of `extractor`."""
    from cleanfid import fid

    def network(batch: torch.Tensor) -> torch.Tensor:
        x = (batch - 127) / 128  # of floats in 0..255
        return extractor._layers(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    with torch.no_grad():
        return fid.get_folder_features(str(folder), network, num_workers=workers, device=torch.device("cpu"), custom_fn_resize=lambda x: x,
                                       verbose=False)  # fmt: skip


def clean_fid_distance(a: np.ndarray, b: np.ndarray) -> float:
    from cleanfid import fid

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy announces what it will drop
        return float(fid.fid_from_feats(a, b))


def compare(n: int, side: int, rounds: int, workers: int, folder: Path, wide: int = WIDE) -> list[str]:
    """The rows of the table; raises AssertionError where the two do not agree."""
    repair_torchvision()
    sets = [folder / "generated", folder / "reference"]
    for seed, where in enumerate(sets):
        write_images(where, n, side, seed)
    extractor = EffLite0((side, side))
    kept: dict[str, tuple[list[np.ndarray], float]] = {}

    def whole(name: str, features: Callable[[Path], np.ndarray], distance: Callable[..., float]) -> Callable[[], None]:
        def call() -> None:
            both = [features(where) for where in sets]
            kept[name] = both, distance(*both)

        return call

    ours = whole("ours", lambda where: our_features(where, extractor), frechet_distance)
    theirs = whole("theirs", lambda where: clean_fid_features(where, extractor, workers), clean_fid_distance)
    pairs = paired(ours, theirs, rounds)
    (mine, distance), (other, expected) = kept["ours"], kept["theirs"]
    assert all(np.abs(a - b).max() < 1e-4 for a, b in zip(mine, other, strict=True)), "the features differ"
    assert abs(distance - expected) < 1e-4 * max(1.0, abs(expected)), f"the distances differ: {distance} and {expected}"
    rates = [2 * n / sorted(column)[len(column) // 2] for column in zip(*pairs, strict=True)]
    rows = [
        line(f"end to end, 2 x {n} of {side} px", pairs, "at least 1"),
        f"  images a second: {rates[0]:.0f} against {rates[1]:.0f}; distance {distance:.6g} against {expected:.6g}",
    ]
    rows.append(line(f"statistics, width {mine[0].shape[1]}", _statistics(mine, NARROW_ROUNDS), f"at least {FASTER:g}"))
    rows.append(f"  two covariances alone, by numpy: {covariances_ms(mine):.2f} ms")
    generator = np.random.default_rng(0)
    synthetic = [np.maximum(generator.standard_normal((n, wide)) + shift, 0) for shift in (0.0, 0.1)]
    rows.append(line(f"statistics, width {wide}", _statistics(synthetic, rounds), f"at least {FASTER:g}"))
    return rows


def covariances_ms(features: list[np.ndarray]) -> float:
    """Milliseconds, the median, that numpy takes for the covariances of these sets."""
    found = []
    for _ in range(NARROW_ROUNDS):
        start = time.perf_counter()
        for rows in features:
            np.cov(rows, rowvar=False)
        found.append(time.perf_counter() - start)
    return 1e3 * statistics.median(found)


def _statistics(features: list[np.ndarray], rounds: int) -> list[tuple[float, float]]:
    return paired(lambda: frechet_distance(*features), lambda: clean_fid_distance(*features), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds = f"median of {options.rounds} rounds in turns, {NARROW_ROUNDS} of the narrow statistics"
    print(f"{machine(options.threads)}; clean-fid with {options.workers} workers; {rounds}")
    print(heading("scoring", "ours ms", "clean-fid ms"))
    with tempfile.TemporaryDirectory() as folder:
        for row in compare(options.n, options.side, options.rounds, options.workers, Path(folder)):
            print(row, flush=True)


if __name__ == "__main__":
    main()
