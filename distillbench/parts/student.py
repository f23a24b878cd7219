"""The student most methods hand back: a denoiser called a few times, with fresh or reused noise between the calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..api import Conditions, Samples, Student
from ..diffusion.denoiser import Denoiser
from ..diffusion.solvers import few_step
from ..errors import BadFileError, UsageError
from ..networks import load_network, save_network
from ..randomness import sample_noise


class FewStepStudent(Student):
    """Calls `denoiser` at the times that `grids` holds for a step count (decreasing, without the final 0).

    mode "renoise" draws fresh noise between the calls, "deterministic" reuses the noise that the prediction implies.
    guidance_input: the value fed to a guidance-conditioned network when `generate` is given none.
    """

    def __init__(self, denoiser: Denoiser, grids: Mapping[int, Sequence[float]], shape: Sequence[int], *, mode: str = "renoise",
                 guidance_input: float | None = None):  # fmt: skip
        self.denoiser = denoiser
        self.grids = {int(n): tuple(float(t) for t in times) for n, times in sorted(grids.items())}
        self.shape = tuple(int(n) for n in shape)
        self.mode = mode
        self.guidance_input = guidance_input
        self.steps = tuple(self.grids)

    @torch.no_grad()
    def generate(self, conditions: Conditions, *, steps: int, seeds: Sequence[int], guidance: float | None = None,
                 negative: Conditions | None = None) -> Samples:  # fmt: skip
        if steps not in self.grids:
            raise UsageError(f"this student was trained for {', '.join(map(str, self.steps))} steps, not {steps}")
        device = next(self.denoiser.parameters()).device

        def noise(draw: int) -> Tensor:
            return sample_noise(seeds, self.shape, draw).to(device)

        value = guidance if guidance is not None else self.guidance_input
        x = few_step(self.denoiser, conditions.to(device), self.grids[steps], noise, mode=self.mode, guidance=value)
        return Samples(x, evaluations=steps)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_network(self.denoiser.network, folder)
        card = {"denoiser": self.denoiser.to_config(), "grids": self.grids, "shape": self.shape, "mode": self.mode,
                "guidance_input": self.guidance_input, **self.extra_config()}  # fmt: skip
        (folder / "student.json").write_text(json.dumps(card, indent=1))

    def extra_config(self) -> dict[str, Any]:
        """What a subclass adds to student.json and takes back as keyword arguments."""
        return {}

    @classmethod
    def load(cls, folder: Path) -> Self:
        try:
            card = json.loads((folder / "student.json").read_text())
            denoiser = Denoiser.from_config(card.pop("denoiser"), load_network(folder))
            grids = {int(n): times for n, times in card.pop("grids").items()}
            return cls(denoiser, grids, card.pop("shape"), **card)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadFileError(f"{folder.name} holds no student that can be read ({type(error).__name__}: {error})") from None
