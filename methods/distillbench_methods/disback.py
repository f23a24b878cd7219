"""DisBack, distribution backtracking. Zhang et al. 2024 (ICLR 2025), arXiv 2408.15991; official code SYZhang0805/DisBack.

Diff-Instruct whose teacher walks. At first the student's samples are such as the teacher never saw, and its score is wrong there. So
record how the teacher degrades while it learns them, then follow the records back; the student's loss is Diff-Instruct's all along.

    record        s'_0 = teacher;  N times M updates of the fake score's loss on samples of the untrained student;  s'_n = a copy
    walk back     fake = s'_N;  for i = N - 1, ..., 1:  student  sg[ w (D_fake(x_t) - D_s'_i(x_t)) ] x,  fake score on the student's x
    end           the same with the teacher itself

Each time the teacher is exchanged its weights must change: in the released script they do not, as its keys do not match and are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from distillbench.api import Batch, Claim, Conditions, Context, ContractError, Ema, MethodInfo, OptimizerConfig, Search, Stage, Turn, knob
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.solvers import jump

from .diff_instruct import DiffInstruct

WATCH_EVERY = 20  # cycles from one measurement of the mismatch to the next


@torch.no_grad()
def mismatch(x: Tensor, t: Tensor, noise: Tensor, conditions: Conditions, teacher: Denoiser, fake: Denoiser, *,
             guidance_scale: float = 1.0) -> Tensor:  # fmt: skip
    """E|D_fake(x_t) - D_teacher(x_t)| / E|x - D_teacher(x_t)|, a number, at a student's samples x (n, *shape) and path times t (n,).

    How far the present target is from what the student does, in units of what denoising changes. The teacher is guided.
    """
    x_t = jump(teacher.path, x, noise, t)
    target = teacher.x0(x_t, t, conditions, guidance_scale=guidance_scale)
    return (fake.x0(x_t, t, conditions) - target).abs().mean() / (x - target).abs().mean()


class DisBack(DiffInstruct):
    info = MethodInfo(
        id="disback",
        version=1,
        title="DisBack (distribution backtracking)",
        paper="arXiv 2408.15991",
        year=2024,
        family="score distillation",
        domain=("diffusion",),
        needs=(),
        data_access="conditions",
        steps=(1,),
        trains="one student",
        deviations=(
            "student, noise levels, rates, their decay and the average are Diff-Instruct's, with its deviations: the paper's EDM settings "
            "are not released; its SDXL script starts from a DMD2 checkpoint and adds DMD2's GAN, which are left out",
            "weighting is DMD's normaliser (released script); updates of the student and the fake score alternate (script: 1 to 5)",
            "10 updates to a node (script: 100 at a rate of 5e-7), and less than N nodes where degrade_share is spent before",
            "20 updates of the student towards a node, fewer where walk_share is spent before (script: 200, 0.1 of its run in all)",
            "implemented from the algorithm: the released script (read, not run) loads recorded weights under names that do not match, so "
            "that nothing is swapped, and its node counter stops after the first swap; here a swap that changes no weight stops the run",
            "the fake score starts from the last node, the paper's algorithm as we remember it [memory]; its Adam moments start at 0, the "
            "student's are kept over swaps (script)",
            "under guidance one condition in ten is dropped while recording, as nodes are guided later (script: none, so that what a node "
            "says without conditions drifts)",
            "advance=adaptive goes on when the mismatch relative to what denoising changes did not fall in `patience` measurements",
            "reconstructed: adaptive advance, average of the recorded weights; from memory, unverified: number of nodes, that few are "
            "enough, the speed-up of 2 to 3",
            "not claims: fewer updates to a given distance and smaller mismatch early on (figures of the report), no worse at a large "
            "budget (no difference), that the advantage vanishes with an exact teacher",
        ),
        claims=(
            Claim("one step of the student beats one step of the teacher", "disback", "teacher", "sliced-w2"),
            Claim("one step of the student beats one step of the teacher", "disback", "teacher", "in-mode", margin=0.1),
            Claim("walking back beats the fixed teacher, recording included", "disback", "diff_instruct(weighting=inv_l1)", "sliced-w2"),
            Claim("walking back beats the fixed teacher, recording included", "disback", "diff_instruct(weighting=inv_l1)", "fd", "digits"),
            Claim("few nodes are enough: 20 waste budget", "disback", "disback(nodes=20)", "sliced-w2"),
            Claim("a fake score from the last node beats one from the teacher", "disback", "disback(fake_init=teacher)", "sliced-w2"),
        ),
        tunes=(  # Diff-Instruct's own, so that the two are compared at equal care
            Search("lr", 1e-4, 3e-3, log=True),
            Search("fake_lr", 3e-4, 1e-2, log=True),
            Search("sigma_init", 1.0, 10.0, log=True),
        ),
    )

    @dataclass(frozen=True)
    class Config(DiffInstruct.Config):
        weighting: str = knob("inv_l1", "w: none is 1, inv_l1 is DMD's, alpha^2/sigma^2 the divergence's own",
                              choices=("none", "inv_l1", "alpha^2/sigma^2"))  # fmt: skip
        nodes: int = knob(5, "N, the most that are recorded (paper: 5 to 10); 0 is Diff-Instruct", low=0, high=100)
        degrade_updates: int = knob(10, "M, updates of the degrading teacher from one node to the next", low=1)
        degrade_share: float = knob(0.1, "most of the budget that recording may take (paper: 0.01 to 0.04)", low=1e-3, high=0.9)
        degrade_lr: float | None = knob(None, "of the degrading teacher; None: the fake score's", low=0)
        degrade_null_prob: float = knob(0.1, "chance that a sample has no condition while recording for a guided teacher", low=0, high=1)
        node_half_life: float = knob(0.0, "of the average of weights that is recorded, in updates; 0: the weights", low=0)
        walk_updates: int = knob(20, "K, most updates of the student towards a node (released script: 200)", low=1)
        walk_share: float = knob(0.1, "most of the budget that nodes N - 1 to 1 may take (script: about 0.1)", low=1e-3, high=0.9)
        advance: str = knob("updates", "to the next node: after K updates, or before when the mismatch stops falling",
                            choices=("updates", "adaptive"))  # fmt: skip
        patience: int = knob(3, "measurements without a new low after which adaptive goes on", low=1)
        fake_init: str = knob("last node", "what the fake score starts from", choices=("last node", "teacher"))

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.nodes and self.fake == "none":
                raise ValueError("nodes are recorded with the fake score: set fake=trained or nodes=0")
            if self.degrade_share + self.walk_share >= 1:
                raise ValueError(f"degrade_share {self.degrade_share} and walk_share {self.walk_share} leave the teacher itself nothing")

    config: Config

    def build(self, context: Context) -> None:
        super().build(context)
        self.original: Denoiser = context.teacher
        self.teacher = self.original.copy()  # whose weights are exchanged
        self.nodes = nn.ModuleList(self.original.copy() for _ in range(self.config.nodes))
        self.smoothed = self.original.copy() if self.config.nodes and self.config.node_half_life else None
        self.recorded = 0
        self.paced = 0  # updates towards the present node
        self.lowest: float | None = None  # mismatch with the present node, and measurements since
        self.stale = 0

    def stages(self) -> list[Stage]:
        c = self.config
        if not c.nodes:
            return super().stages()
        way = list(range(c.nodes - 1, 0, -1))
        walk = [self.towards(i, c.walk_share / len(way)) for i in way]
        return [self.recording(), *walk, self.towards(0, 1 - c.degrade_share - (c.walk_share if way else 0.0))]

    def recording(self) -> Stage:
        """M updates of the degrading teacher, which is the later fake score, then the record of a node; the student stands still."""
        c = self.config
        assert self.fake is not None
        lr = next(rate for rate in (c.degrade_lr, c.fake_lr, c.lr) if rate is not None)
        moved = OptimizerConfig(lr, name="adam", betas=(c.betas[0], c.betas[1]), clip=c.clip, decay=c.decay, over="training")
        degrade = Turn("degradation", self.degrade_turn, {"fake": self.fake}, repeat=c.degrade_updates, optimizer={"fake": moved},
                       batch_size=c.batch_size)  # fmt: skip
        ema = {"smoothed": Ema("fake", c.node_half_life)} if self.smoothed is not None else {}
        return Stage("recording", c.degrade_share, [degrade, Turn("record", self.record_turn)], end=self.start_fake,
                     done=lambda: self.recorded == c.nodes, ema=ema)  # fmt: skip

    def towards(self, i: int, share: float) -> Stage:
        """Diff-Instruct's stage with node i as the teacher. What a node leaves of its share comes to the teacher's stage in the end."""
        stage = replace(self.distillation(f"node {i}" if i else "teacher", share), begin=partial(self.backtrack, i))
        if not i:
            return stage
        pace = [Turn(f"pace {i}", self.pace_turn)]
        if self.config.advance == "adaptive":
            pace.append(Turn("watch", self.watch_turn, batch_size=self.config.batch_size))
        return replace(stage, turns=[*stage.turns, *pace], done=partial(self.passed, i))

    def node(self, i: int) -> Denoiser:
        """s'_i; node 0 is the original teacher."""
        return cast(Denoiser, self.nodes[i - 1]) if i else self.original

    def degrade_turn(self, batch: Batch) -> dict[str, Tensor]:
        """L_deg: the fake score's loss. A node will be guided, so it must also know what to say without conditions."""
        return {"degradation": self.denoising(batch, drop=self.config.degrade_null_prob if self.scale != 1 else 0.0)}

    def record_turn(self, batch: Batch) -> None:
        """The weights of now become node `count + 1`."""
        assert self.fake is not None
        copy_weights(self.fake if self.smoothed is None else self.smoothed, self.node(batch.count + 1))
        self.recorded = batch.count + 1

    def start_fake(self) -> None:
        assert self.fake is not None
        copy_weights(self.node(self.recorded if self.config.fake_init == "last node" else 0), self.fake)

    def backtrack(self, i: int) -> None:
        """Node i becomes the teacher, if the way leads over it: it starts before the last node, which the student matches already."""
        self.paced = 0
        if i >= self.recorded:
            return
        if equal_weights(self.node(i), self.node(i + 1)):
            raise ContractError(f"{self.info.id}: nodes {i + 1} and {i} have the same weights, so that the way back leads nowhere; "
                                "raise degrade_lr or degrade_updates")  # fmt: skip
        copy_weights(self.node(i), self.teacher)
        self.lowest, self.stale = None, 0

    def pace_turn(self, batch: Batch) -> None:
        """Counts the updates towards a node: each has a turn of its own."""
        self.paced = batch.count + 1

    def passed(self, i: int) -> bool:
        c = self.config
        return i >= self.recorded or self.paced >= c.walk_updates or (c.advance == "adaptive" and self.stale >= c.patience)

    def watch_turn(self, batch: Batch) -> None:
        """Measure, now and then, whether the student still comes nearer to the node."""
        assert self.fake is not None
        if batch.count % WATCH_EVERY:
            return
        x, conditions = self.generate(batch)
        t, noise = self.times(self.config.law, batch), batch.randn(*x.shape)
        value = mismatch(x, t, noise, conditions, self.teacher, self.fake, guidance_scale=self.scale).item()
        if self.lowest is None or value < self.lowest:
            self.lowest, self.stale = value, 0
        else:
            self.stale += 1


def copy_weights(source: nn.Module, into: nn.Module) -> None:
    into.load_state_dict(source.state_dict())


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
