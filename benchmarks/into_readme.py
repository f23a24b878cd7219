"""Put what `make speed` printed (benchmarks/results.txt, and gpu_full_size.txt of the last run with a GPU) into the README."""

from __future__ import annotations

from pathlib import Path

from distillbench.publish import with_block

ROOT = Path(__file__).parent.parent

if __name__ == "__main__":
    page = ROOT / "README.md"
    results = "\n\n".join((ROOT / "benchmarks" / name).read_text().strip() for name in ("results.txt", "gpu_full_size.txt"))
    about = (
        "A training step under the loop over the same step in a bare loop with the same fused optimiser, clipping and averages; the\n"
        "statistics against three packages on the same features; scoring images end to end against clean-fid with the same extractor;\n"
        "sampling and training through the diffusers adapter against the bare pipeline and a bare loop; a cycle of turns at full size\n"
        "on a GPU (`make speed`):"
    )
    block = f"{about}\n\n```\n{results}\n```"
    page.write_text(with_block(page.read_text(), "speed", block))
