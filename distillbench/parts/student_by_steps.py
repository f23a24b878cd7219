"""A student that holds a network per number of steps: k-step flows, stages that halve the steps, a one-step network beside its parent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..api import Conditions, Samples, Student
from ..diffusion.denoiser import Denoiser
from ..diffusion.solvers import few_step
from ..errors import BadFileError, ContractError, UsageError
from ..networks import load_network, save_network
from ..randomness import sample_noise

MODES = ("deterministic", "renoise")


class StudentBySteps(Student):
    """For n steps it calls `denoisers[n]` at the times `grids[n]` (decreasing from noise, without the final 0).

    mode "deterministic" keeps the noise that a prediction implies (ddim; on `flow` that is Euler), "renoise" draws fresh noise.
    Step counts may share a Denoiser or its network: it is one module, counted once and saved once.
    """

    def __init__(self, denoisers: Mapping[int, Denoiser], grids: Mapping[int, Sequence[float]], shape: Sequence[int], *,
                 mode: str = "deterministic"):  # fmt: skip
        self.grids = {int(n): tuple(float(t) for t in times) for n, times in sorted(grids.items())}
        if not self.grids or {int(n) for n in denoisers} != set(self.grids):
            raise ContractError(f"a denoiser for {sorted(denoisers)} steps, times for {sorted(self.grids)}; give both for the same counts")
        if mode not in MODES:
            raise ContractError(f"the noise between steps is {' or '.join(MODES)}, not {mode!r}")
        self.denoisers = nn.ModuleDict({str(n): denoisers[n] for n in self.grids})
        self.shape = tuple(int(n) for n in shape)
        self.mode = mode
        self.steps = tuple(self.grids)

    def denoiser_for(self, steps: int) -> Denoiser:
        """The denoiser called in `steps` steps. Raises UsageError for a count that it was not made for."""
        if steps not in self.grids:
            raise UsageError(f"this student was trained for {', '.join(map(str, self.steps))} steps, not {steps}")
        denoiser = self.denoisers[str(steps)]
        assert isinstance(denoiser, Denoiser)
        return denoiser

    def networks(self, steps: int) -> list[nn.Module]:
        return [self.denoiser_for(steps)]

    @property
    def denoiser(self) -> nn.Module:
        """All networks in one module, each once among its parameters: what the weights of this student are."""
        return self.denoisers

    @torch.no_grad()
    def generate(self, conditions: Conditions, *, steps: int, seeds: Sequence[int], guidance: float | None = None,
                 negative: Conditions | None = None) -> Samples:  # fmt: skip
        denoiser = self.denoiser_for(steps)
        device = next(denoiser.parameters()).device

        def noise(draw: int) -> Tensor:
            return sample_noise(seeds, self.shape, draw).to(device)

        x = few_step(denoiser, conditions.to(device), self.grids[steps], noise, mode=self.mode, guidance=guidance)
        return Samples(x, evaluations=steps)

    def save(self, folder: Path) -> None:
        """`network-<n>` for each network, named after the smallest number of steps that uses it, and student.json."""
        folder.mkdir(parents=True, exist_ok=True)
        names: dict[int, str] = {}
        parts: dict[str, dict[str, Any]] = {}
        for n in self.steps:
            denoiser = self.denoiser_for(n)
            if id(denoiser.network) not in names:
                names[id(denoiser.network)] = f"network-{n}"
                save_network(denoiser.network, folder, name=f"network-{n}")
            parts[str(n)] = {"weights": names[id(denoiser.network)], "denoiser": denoiser.to_config(), "times": self.grids[n]}
        card = {"parts": parts, "shape": self.shape, "mode": self.mode}
        (folder / "student.json").write_text(json.dumps(card, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Self:
        try:
            card = json.loads((folder / "student.json").read_text())
            parts = {int(n): part for n, part in card["parts"].items()}
            networks = {name: load_network(folder, name=name) for name in sorted({_inside(part["weights"]) for part in parts.values()})}
            denoisers = {n: Denoiser.from_config(part["denoiser"], networks[part["weights"]]) for n, part in parts.items()}
            return cls(denoisers, {n: part["times"] for n, part in parts.items()}, card["shape"], mode=card["mode"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ContractError) as error:
            raise BadFileError(f"{folder.name} holds no student that can be read ({type(error).__name__}: {error})") from None


def _inside(name: str) -> str:
    """A name of weights that stays in the student's folder."""
    if Path(name).name != name:
        raise ValueError(f"weights {name!r} lie outside the folder")
    return name
