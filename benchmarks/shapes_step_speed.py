"""What the harness costs on `shapes`: a training step under the loop over the same step in a bare loop. As harness_speed.py.

python benchmarks/shapes_step_speed.py [--pairs 7] [--cycles 6]
"""

from __future__ import annotations

import argparse

import torch
from harness_speed import bare, harness
from pairs import heading, line, machine

from distillbench.tracks.base import Track

ROWS = (("shapes-sd", "cd"), ("shapes-sd", "dmd2"), ("shapes-sd", "swiftbrush"), ("shapes-sana", "scm"), ("shapes-sana", "sana_sprint"))
MOST = 1.03


def compare(method: str, track: str | Track, pairs: int, cycles: int) -> list[tuple[float, float]]:
    """Seconds a cycle in the bare loop and under the harness, in each round; who goes first alternates."""
    found = []
    for number in range(pairs):
        order = (bare, harness) if number % 2 else (harness, bare)
        seconds = {kind: kind(method, track, cycles) for kind in order}
        found.append((seconds[bare], seconds[harness]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--cycles", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine(1)}; median of {options.pairs} pairs of {options.cycles} cycles")
    print(heading("training step", "bare ms", "loop ms"))
    for track, method in ROWS:
        print(line(f"{track} {method}", compare(method, track, options.pairs, options.cycles), f"at most {MOST:g}"), flush=True)


if __name__ == "__main__":
    main()
