"""InstaFlow: reflow, then one-step distillation. Liu et al. 2023 (ICLR 2024), arXiv 2309.06380, on rectified flow, arXiv 2209.03003;
official code gnobitab/RectifiedFlow (training, CIFAR-10) and gnobitab/InstaFlow (inference only).

What an ODE makes of a noise is hard to fit in one step while its paths are bent. So the coupling is straightened before it is fitted:

    pairs 0     (noise, x, c): x = ODE of the teacher from the noise
    reflow      L = E |v(x_t, t) - (noise - x)|^2, x_t = (1 - t) x + t noise, v begun at the teacher's weights
    pairs 1     fresh noise and conditions through the average of v; `n_reflow` times over, then
    distil      L = D(noise - g(noise, 1), x), g begun at v; D is L2, then LPIPS (here L2, then features if asked for)

One step is g's Euler step. More are Euler steps of the reflowed v, the k-rectified flow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distillbench.api import Batch, Claim, Conditions, Context, Ema, Method, MethodInfo, OptimizerConfig, Search, Stage, Turn, knob
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.schedules import Flow
from distillbench.diffusion.solvers import SOLVERS, euler, time_grid
from distillbench.errors import NotApplicable, UsageError
from distillbench.parts.critics import middle_tap
from distillbench.parts.features import feature_loss
from distillbench.parts.pairs import PairStore
from distillbench.parts.rectified_flow import line_times, one_step, reflow_loss
from distillbench.parts.simulation import step_grid
from distillbench.parts.student_by_steps import StudentBySteps


class InstaFlow(Method):
    info = MethodInfo(
        id="instaflow",
        version=1,
        title="InstaFlow (reflow, then one-step distillation)",
        paper="arXiv 2309.06380, arXiv 2209.03003",
        year=2023,
        family="rectified flow",
        domain=("diffusion",),
        needs=(),
        data_access="teacher samples",
        steps=(1, 2, 4),
        trains="one student",
        deviations=(
            "no training script of InstaFlow was released: stages follow the paper, losses and CIFAR-10 values the rectified flow code",
            "from memory, unverified: guidance 6 for the teacher's pairs and 1.5 for those of the reflowed network",
            "time runs from clean to noise: t = 1 - tau, and the network predicts noise - x, the paper's velocity with its sign turned",
            "pairs are charged, so stages are shares of the budget instead of counts, and pairs are thousands instead of millions",
            "D is L2 throughout by default; the paper's is L2, then LPIPS, for which vectors and digits have no network",
            "in the place of LPIPS (distill_loss): the squared distance of the frozen teacher's middle features, scaled to unit length, "
            "of both samples under the same noise; LPIPS sums several layers of VGG with learned weights, on clean images",
            "distillation is at tau = 0 exactly; the code's tau = 0.001 shows the student a thousandth of its target",
            "RK45 with adaptive steps, the solver of rectified flow, is not to be had; the default is DPM-Solver++ with 12 steps",
            "a teacher of another noise schedule is read as a velocity on this path at equal signal-to-noise ratio; the paper gives its "
            "weights a new meaning",
            "the stacked U-Net (InstaFlow-1.7B) is left out: two networks in series would be two evaluations here",
            "the reflowed network is sampled without guidance; the official pipeline has 1 to 2",
            "reflow and distillation keep one batch size; the paper goes from 64 to 1024",
            "rates: default 1e-3 for small networks (CIFAR-10 2e-4; for Stable Diffusion 1e-5 diverged and 1e-7 was slow)",
            "warm-up is a share of each stage (code: 5000 updates); the half-life of the averages is at most 5 % of the updates so far",
            "dropout within the network (code: 0.1) is left out",
            "with n_reflow=0 two and four steps are Euler steps of the untrained copy of the teacher: only one step is distilled",
            "reflow against direct distillation is compared at equal compute, pairs included; the paper's at equal updates of the student",
            "in two dimensions the teacher's coupling is easy to fit, so the claims about reflow may well fail on mixture2d",
            "not claims: straighter paths, a lower transport cost and unchanged marginals after reflow (shown by tests; no board has them)",
        ),
        claims=(
            Claim("one distilled step beats one Euler step of the teacher", "instaflow", "teacher", "sliced-w2"),
            Claim("one distilled step beats one Euler step of the teacher", "instaflow", "teacher", "in-mode"),
            Claim("one Euler step of the reflowed network beats one of the teacher", "instaflow(distill=false)", "teacher", "sliced-w2"),
            Claim("distillation beats one Euler step of the reflowed network", "instaflow", "instaflow(distill=false)", "sliced-w2"),
            Claim("reflow before distillation beats direct distillation", "instaflow", "instaflow(n_reflow=0)", "sliced-w2"),
            Claim("reflow before distillation keeps one step nearer to the teacher", "instaflow", "instaflow(n_reflow=0)", "fidelity-w2"),
            Claim("two Euler steps of the reflowed network beat two of the teacher", "instaflow", "teacher", "sliced-w2", steps=2),
            Claim("four Euler steps of the reflowed network beat four of the teacher", "instaflow", "teacher", "sliced-w2", steps=4),
            Claim(
                "L2, then a distance of features beats L2 alone on features",
                "instaflow(distill_loss=l2-features)",
                "instaflow",
                "fd",
                track="digits",
            ),
        ),
        tunes=(Search("lr", 1e-4, 3e-3, log=True), Search("pair_share", 0.1, 0.4), Search("distill_share", 0.2, 0.55)),
    )
    student_type = StudentBySteps

    @dataclass(frozen=True)
    class Config:
        n_reflow: int = knob(1, "rounds of reflow; 0: direct distillation of the teacher's own coupling", low=0, high=3)
        distill: bool = knob(True, "end with one-step distillation; false: one step is an Euler step of the reflowed network")
        pair_share: float = knob(0.25, "share of the budget for all pairs, as much for each round; 0: pairs are made as they are used",
                                 low=0, high=0.9)  # fmt: skip
        distill_share: float = knob(0.4, "share of the budget for distillation; what is left is for reflow", low=0.01, high=0.98)
        n_pairs: int | None = knob(None, "most pairs of a round; None: as many as its share buys (papers: 1 to 3 million)", low=1)
        solver: str = knob("dpmpp_2m", "of the teacher's pairs (Rectified flow: RK45)", choices=("dpmpp_2m", "heun", "euler", "ddim"))
        ode_steps: int = knob(12, "of that solver (papers: 25 of DPM-Solver, RK45 to 1e-5)", low=1, high=1000)
        flow_steps: int = knob(8, "Euler steps of the reflowed network for the pairs that follow (paper: 25)", low=1, high=1000)
        teacher_guidance: float | None = knob(None, "guidance of the teacher's pairs (paper: 6 [memory]); None: the track's", low=0)
        reflow_guidance: float = knob(1.0, "guidance of the reflowed network's pairs (paper: 1.5 [memory]); other than 1 needs drop", low=0)
        drop: float = knob(0.0, "share of conditions left out in reflow, for guidance on the reflowed network (0.1)", low=0, high=0.9)
        time_sampling: str = knob("uniform", "of reflow: all times, noise alone, or the stops of the most Euler steps asked for",
                                  choices=("uniform", "t0", "k-grid"))  # fmt: skip
        tau_eps: float = knob(1e-3, "uniform times keep this distance from pure noise (code: 1e-3)", low=0, high=1e-2)
        distill_loss: str = knob("l2", "D; l2-features: first one, then the other, as in the paper",
                                 choices=("l2", "l2-features", "features", "l2+features"))  # fmt: skip
        feature_share: float = knob(0.45, "share of distillation, at its end, in which l2-features uses features", low=0, high=1)
        feature_time: float = knob(0.3, "noise level at which the teacher's features are read; 0: of clean samples", low=0, high=1)
        tap: str | None = knob(None, "which features of the teacher; None: the middle of the network")
        lr: float = knob(1e-3, "learning rate", low=0)
        optimizer: str = knob("adam", "which optimiser (InstaFlow: adamw)", choices=("adam", "adamw"))
        betas: tuple[float, ...] = knob((0.9, 0.999), "of the optimiser", low=0, high=0.99999)
        weight_decay: float = knob(0.0, "of adamw", low=0)
        clip: float | None = knob(1.0, "largest norm of the gradient", low=1e-9)
        warmup: float = knob(0.01, "share of each stage over which the rate rises from 0 (code: 5000 updates)", low=0, high=1)
        decay: str = knob("constant", "of the rate within each stage, to 0", choices=("constant", "linear", "cosine"))
        decay_from: float = knob(0.0, "share of a stage after which the decay begins", low=0, high=1)
        batch_size: int | None = knob(None, "None: the track's", low=1)
        half_life: float = knob(6931.0, "of both averages, in updates (6931: a decay of 0.9999); 0: none", low=0)
        rampup: float = knob(0.05, "the half-life is at most this share of the updates so far", low=1e-4, high=10)

        def __post_init__(self) -> None:
            if len(self.betas) != 2:
                raise ValueError(f"betas are two numbers, not {len(self.betas)}")
            if not self.n_reflow and not self.distill:
                raise ValueError("n_reflow=0 with distill=false leaves nothing to train")
            if self.n_reflow and self.distill and self.pair_share + self.distill_share >= 1:
                raise ValueError(f"pair_share {self.pair_share} and distill_share {self.distill_share} leave nothing for reflow")
            if self.reflow_guidance != 1 and not self.drop:
                raise ValueError("reflow_guidance needs a reflowed network that knows no condition: set drop, say 0.1")

    config: Config

    def build(self, context: Context) -> None:
        c = self.config
        self.steps, self.shape = context.steps, context.shape
        self.distils = c.distill and 1 in context.steps  # nothing but one step is distilled
        if not c.n_reflow and not self.distils:
            raise UsageError("instaflow: n_reflow=0 distils one step and nothing else; ask for 1 step too, or set n_reflow=1")
        if c.n_reflow and c.time_sampling == "t0" and max(context.steps) > 1:
            raise UsageError("instaflow: time_sampling=t0 trains the flow at pure noise alone, which gives 1 step and no more")
        self.scale = context.guidance if c.teacher_guidance is None else c.teacher_guidance
        self.teacher: Denoiser = context.teacher.on(Flow())
        self.tap = ""
        if self.distils and c.distill_loss != "l2":
            if "taps" not in self.teacher.network.capabilities:
                raise NotApplicable(f"distill_loss={c.distill_loss} needs a network that shows its hidden features")
            self.tap = c.tap or middle_tap(self.teacher)
            self.teacher.network.tap_shape(self.tap)  # says which taps there are, should there be no such one
        self.flow, self.flow_average = self.teacher.copy(), self.teacher.copy()
        self.student, self.average = self.teacher.copy(), self.teacher.copy()
        folder = None if context.folder is None else context.folder / "pairs"
        self.pairs = PairStore(folder, rounds=c.n_reflow + 1, device=context.device)

    def stages(self) -> list[Stage]:
        c = self.config
        rounds = c.n_reflow + self.distils
        last = (c.distill_share if c.n_reflow else 1 - c.pair_share) if self.distils else 0.0
        stages = []
        for k in range(rounds):
            work = Turn(f"pairs {k}", partial(self.make, k), batch_size=c.batch_size)
            stages.append(Stage(work.name, c.pair_share / rounds, [work], done=partial(self.enough, k)))
            if k == c.n_reflow:
                turn = self._trained("distil", partial(self.distil_loss, k), "student")
                stages.append(Stage(turn.name, last, [turn], begin=self.begin_distil, ema={"average": self._ema("student")}))
            else:
                turn = self._trained(f"reflow {k}", partial(self.flow_loss, k), "flow")
                share = (1 - c.pair_share - last) / c.n_reflow
                stages.append(Stage(turn.name, share, [turn], begin=self.begin_reflow, ema={"flow_average": self._ema("flow")}))
        return stages

    def _trained(self, name: str, loss: partial, of: str) -> Turn:
        c = self.config
        optimizer = OptimizerConfig(c.lr, c.optimizer, (c.betas[0], c.betas[1]), weight_decay=c.weight_decay, clip=c.clip,
                                    warmup=c.warmup, decay=c.decay, decay_from=c.decay_from)  # fmt: skip
        return Turn(name, loss, {of: getattr(self, of)}, optimizer={of: optimizer}, batch_size=c.batch_size)

    def _ema(self, of: str) -> Ema:
        return Ema(of, self.config.half_life, self.config.rampup)

    def begin_reflow(self) -> None:
        """v_1 is the teacher; each later round goes on from the average of the one before."""
        self.flow.load_state_dict(self.flow_average.state_dict())

    def begin_distil(self) -> None:
        for network in (self.student, self.average):
            network.load_state_dict(self.flow_average.state_dict())

    def enough(self, k: int) -> bool:
        return self.config.n_pairs is not None and self.pairs.count(k) >= self.config.n_pairs

    def make(self, k: int, batch: Batch) -> None:
        """Work: a batch of pairs for round k."""
        self.pairs.append(*self.solved(k, batch), round=k)

    @torch.no_grad()
    def solved(self, k: int, batch: Batch) -> tuple[Tensor, Tensor, Conditions]:
        """Fresh noise, and what the flow of round k makes of it: the teacher's in round 0, then that of the average of v."""
        c, conditions = self.config, batch.conditions()
        noise = batch.randn(batch.size, *self.shape)
        if k == 0:
            x = SOLVERS[c.solver](self.teacher, noise, conditions, time_grid(Flow(), c.ode_steps), guidance_scale=self.scale)
        else:
            x = euler(self.flow_average, noise, conditions, time_grid(Flow(), c.flow_steps), guidance_scale=c.reflow_guidance)
        return noise, x, conditions

    def drawn(self, k: int, batch: Batch) -> tuple[Tensor, Tensor, Conditions]:
        """Stored pairs of round k, or, where its share bought none, new ones."""
        return self.pairs.draw(batch, round=k) if self.pairs.count(k) else self.solved(k, batch)

    def flow_loss(self, k: int, batch: Batch) -> Tensor:
        """E |v(x_t, t) - (noise - x)|^2 on the pairs of round k."""
        c = self.config
        noise, x, conditions = self.drawn(k, batch)
        t = line_times(c.time_sampling, batch.rand(batch.size), tau_eps=c.tau_eps, k=max(self.steps))
        if c.drop:
            conditions = conditions.dropped(batch.rand(batch.size) < c.drop)
        return reflow_loss(self.flow, noise, x, t, conditions)

    def distil_loss(self, k: int, batch: Batch) -> dict[str, Tensor]:
        """D(one Euler step of g from the noise, x) on the pairs of round k, which no reflow has seen."""
        kind = self.config.distill_loss
        if kind == "l2-features":
            kind = "l2" if batch.progress < 1 - self.config.feature_share else "features"
        noise, x, conditions = self.drawn(k, batch)
        mine, losses = one_step(self.student, noise, conditions), {}
        if kind != "features":
            losses["l2"] = (mine - x).square().mean()
        if kind != "l2":
            at = self.config.feature_time
            losses["features"] = feature_loss(self.teacher, self.tap, mine, x, batch.randn(*x.shape), at, conditions)
        return losses

    def distilled(self) -> StudentBySteps:
        networks = {n: self.average if n == 1 and self.distils else self.flow_average for n in self.steps}
        return StudentBySteps(networks, {n: step_grid(n) for n in self.steps}, self.shape)
