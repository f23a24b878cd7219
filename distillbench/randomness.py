"""Randomness by name and number: every draw depends on what it is for, never on what was drawn before it.

A resumed run, another batch size or a changed repeat of one turn therefore leaves all other noise as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """A 63-bit hash of whole numbers (splitmix64 folded over them)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def name_key(name: str) -> int:
    """A stable 63-bit number for a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def generator_for(seed: int, name: str, count: int) -> torch.Generator:
    """The CPU generator of the `count`-th use of `name` in a run with this seed."""
    return torch.Generator().manual_seed(mix(seed, name_key(name), count))


def sample_noise(seeds: Sequence[int], shape: tuple[int, ...], draw: int = 0) -> Tensor:
    """Standard normal noise (len(seeds), *shape) in float32 on the CPU; row i depends on (seeds[i], draw) alone."""
    noise = torch.empty(len(seeds), *shape)
    generator = torch.Generator()
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(mix(int(seed), draw)))
    return noise
