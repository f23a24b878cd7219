"""SwiftBrush. Nguyen and Tran 2023 (CVPR 2024), arXiv 2312.05239; official code VinAIResearch/SwiftBrush.

One-step distillation without images: variational score distillation (ProlificDreamer, arXiv 2305.16213) of a network in the place of a
scene. The student x = G(z, c) is the teacher's copy called once at t = 1, read as x0. The fake score is the teacher with low-rank
adapters, kept fitted to the student's samples. At x_t = alpha x + sigma eps, both scores under the same guidance scale g:

    student   d = sigma^2 (eps_teacher(x_t) - eps_fake(x_t))      L = 1/2 mean (x - sg(x - d))^2
    fake      L = mean alpha^2 (eps_fake(x_t') - eps')^2          fresh t', eps' on the same x; in one batch of ten without conditions

Both losses of one cycle share x and the weights from before: one turn with an optimiser for each network. As long as the adapters are
zero the two scores are equal, so the student stands still until the fake score has moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from distillbench.api import (
    Batch,
    Claim,
    Conditions,
    Context,
    ContractError,
    Ema,
    Method,
    MethodInfo,
    OptimizerConfig,
    Search,
    Stage,
    Turn,
    knob,
)
from distillbench.diffusion.denoiser import Denoiser
from distillbench.networks.lora import linear_layers
from distillbench.parts.distribution_matching import fake_score_loss, matching_loss, weighted_noise_loss
from distillbench.parts.simulation import pure_noise
from distillbench.parts.student import FewStepStudent

T_MIN = 1e-3  # the lowest of the paper's 1000 noise levels
GRID = (1.0,)


class SwiftBrush(Method):
    info = MethodInfo(
        id="swiftbrush",
        version=1,
        title="SwiftBrush (variational score distillation of a one-step network)",
        paper="arXiv 2312.05239",
        year=2023,
        family="score distillation",
        domain=("diffusion",),
        needs=("lora",),
        data_access="conditions",
        steps=(1,),
        trains="one student",
        deviations=(
            "times are uniform on [0.02, 0.98] and [0.001, 1] of the teacher's own path, the paper's are integers {20..980} and {0..999}",
            "with several fake updates per student update each draws its own batch; with one (the paper's) both losses share their x",
            "the student's input is sigma_T z; the code's is z, on Stable Diffusion's schedule 0.2 % more",
            "alpha_T and sigma_T are the schedule's, not the code's rounded 0.0047; where alpha_T is 0 an eps network is asked just before",
            "the guidance scale is the track's unless g is given (paper: 4.5); at scale 1 the second evaluation and the dropping of "
            "conditions, which serve guidance only, are left out",
            "adapters sit on to_q and to_v where the network has layers of these names, else on every linear layer; their rank is at most "
            "the network's width, with the paper's scaling 108 / 64 kept",
            "the fake score holds its own copy of the frozen weights; the paper switches adapters of one copy on and off",
            "the LoRA's rate is the paper's 1e-3, the student's 3e-4 for small networks (paper 1e-6 for 0.9 billion weights)",
            "the average that is scored has a half-life of 700 updates, at most 5 % of the updates so far (the paper's is not known to us)",
            "w(t) = inv_l1 (DMD's norm) is of x0 predictions, with the normaliser held above 0.001",
            "weighting alpha^2 of the fake score's loss is the path's own: on flow it falls faster towards noise than on the paper's",
            "from memory, unverified: prompt set, total batch and hardware, and what the ablations of fake score and parameterisation gave",
            "v2 (arXiv 2408.14176) is left out: start from SD-Turbo, clamped CLIP loss, interpolation of weights",
            "not claims: that no images are needed (shown by a test), oversaturation under SDS, HPSv2 and CLIP score of the paper's tables",
        ),
        claims=(
            Claim("one step of the student beats one step of the teacher", "swiftbrush", "teacher", "sliced-w2"),
            Claim("one step of the student beats one step of the teacher", "swiftbrush", "teacher", "in-mode", margin=0.1),
            Claim("a fake score beats none (SDS)", "swiftbrush", "swiftbrush(fake=none)", "sliced-w2"),
            Claim("without a fake score (SDS) diversity falls", "swiftbrush", "swiftbrush(fake=none)", "coverage"),
            Claim(
                "the student read as x0 trains faster than its raw output", "swiftbrush", "swiftbrush(parameterisation=raw)", "sliced-w2"
            ),
            Claim("more guidance raises alignment", "swiftbrush(g=4.5)", "swiftbrush", "class-acc"),
            Claim("more guidance lowers recall", "swiftbrush", "swiftbrush(g=4.5)", "coverage"),
        ),
        tunes=(
            Search("lr", 1e-4, 3e-3, log=True),
            Search("fake_lr", 1e-3, 2e-2, log=True),
            Search("fake_weighting", choices=("alpha^2", "plain")),
        ),
    )
    student_type = FewStepStudent

    @dataclass(frozen=True)
    class Config:
        g: float | None = knob(None, "guidance scale of both scores (paper: 4.5); None: the track's", low=0)
        guide_fake: bool = knob(True, "guide the fake score like the teacher; false: DMD's choice")
        fake: str = knob("trained", "the fake score: trained on the student's samples, or none (SDS)", choices=("trained", "none"))
        lora_rank: int = knob(64, "of the fake score's adapters, at most the network's width; 0: a full copy of the teacher", low=0)
        lora_alpha: float = knob(108.0, "adapters are scaled by lora_alpha / lora_rank", low=1e-6)
        lora_targets: tuple[str, ...] = knob(
            ("to_q", "to_v"), "names of the layers that have adapters; where none is found: all linear layers"
        )
        weighting: str = knob("sigma^2", "w(t): on noise (sigma^2, 1), or the norm of DMD (inv_l1)", choices=("sigma^2", "1", "inv_l1"))
        norm_floor: float = knob(1e-3, "least value of the normaliser of inv_l1", low=1e-9)
        fake_weighting: str = knob("alpha^2", "of the fake score's loss: alpha^2 on noise (paper), or plain in what the network predicts",
                                   choices=("alpha^2", "plain"))  # fmt: skip
        parameterisation: str = knob(
            "x0", "the student's sample: x0 from its prediction at t = 1, or its raw output", choices=("x0", "raw")
        )
        null_prob: float = knob(0.1, "chance that a whole batch of a guided fake score has no conditions", low=0, high=1)
        t_min: float = knob(0.02, "lowest noise level of the student's loss", low=T_MIN, high=1)
        t_max: float = knob(0.98, "highest noise level of the student's loss", low=T_MIN, high=1)
        fake_per_student: int = knob(1, "updates of the fake score per update of the student", low=1, high=100)
        lr: float = knob(3e-4, "of the student (paper: 1e-6)", low=0)
        fake_lr: float = knob(1e-3, "of the adapters, or of the full copy", low=0)
        betas: tuple[float, ...] = knob((0.9, 0.999), "of Adam", low=0, high=1)
        clip: float | None = knob(1.0, "largest gradient norm of each network", low=1e-9)
        decay: str = knob("constant", "of both rates, to 0 at the end", choices=("constant", "linear", "cosine"))
        batch_size: int | None = knob(None, "None: the track's", low=1)
        half_life: float = knob(700.0, "of the moving average that is scored, in student updates; 0: none", low=0)

        def __post_init__(self) -> None:
            if self.t_min >= self.t_max:
                raise ValueError(f"t_min {self.t_min} is not below t_max {self.t_max}")
            if len(self.betas) != 2:
                raise ValueError(f"betas are two numbers, not {len(self.betas)}")

    config: Config

    def build(self, context: Context) -> None:
        c = self.config
        if tuple(context.steps) != (1,):
            raise ContractError(f"swiftbrush trains a student of one step, not of {', '.join(map(str, context.steps))}")
        self.shape = context.shape
        self.scale = context.guidance if c.g is None else c.g
        self.fake_scale = self.scale if c.guide_fake else 1.0
        self.teacher: Denoiser = context.teacher
        self.student, self.average = self._student(), self._student()
        self.fake = None if c.fake == "none" else self._fake(context)

    def _student(self) -> Denoiser:
        copy = self.teacher.copy()
        return copy if self.config.parameterisation == "x0" else Denoiser(copy.network, copy.schedule, "x0", path=copy.path)

    def _fake(self, context: Context) -> Denoiser:
        c, network = self.config, self.teacher.network
        if c.lora_rank == 0:
            return self.teacher.copy()
        rank = min(c.lora_rank, network.config.width)
        targets = c.lora_targets if linear_layers(network, c.lora_targets) else ()
        adapted = network.lora(rank, context.generator("adapters"), alpha=rank * c.lora_alpha / c.lora_rank, targets=targets)
        return self.teacher.with_network(adapted)

    def stages(self) -> list[Stage]:
        c = self.config
        moved = partial(OptimizerConfig, name="adam", betas=(c.betas[0], c.betas[1]), clip=c.clip, decay=c.decay)
        student, fake = moved(c.lr), moved(c.fake_lr)
        if self.fake is None:
            turns = [Turn("student", self.student_turn, {"student": self.student}, optimizer={"student": student}, batch_size=c.batch_size)]
        elif c.fake_per_student == 1:
            turns = [Turn("both", self.both_turn, {"student": self.student, "fake": self.fake},
                          optimizer={"student": student, "fake": fake}, batch_size=c.batch_size)]  # fmt: skip
        else:
            turns = [
                Turn("student", self.student_turn, {"student": self.student}, optimizer={"student": student}, batch_size=c.batch_size),
                Turn(
                    "fake",
                    self.fake_turn,
                    {"fake": self.fake},
                    repeat=c.fake_per_student,
                    optimizer={"fake": fake},
                    batch_size=c.batch_size,
                ),
            ]
        return [Stage("train", 1.0, turns, ema={"average": Ema("student", c.half_life, rampup=0.05)})]

    def both_turn(self, batch: Batch) -> dict[str, Tensor]:
        """Both losses on one x; each reaches its own network only."""
        x, conditions = self.generate(batch)
        return {"matching": self.student_loss(batch, x, conditions), "fake score": self.fake_loss(batch, x, conditions)}

    def student_turn(self, batch: Batch) -> dict[str, Tensor]:
        return {"matching": self.student_loss(batch, *self.generate(batch))}

    def fake_turn(self, batch: Batch) -> dict[str, Tensor]:
        """The student is frozen in this turn, so its samples carry no graph."""
        return {"fake score": self.fake_loss(batch, *self.generate(batch))}

    def generate(self, batch: Batch) -> tuple[Tensor, Conditions]:
        """x = G(z, c), as at inference."""
        conditions = batch.conditions()
        return self.student.x0(pure_noise(self.student, GRID, batch.randn(batch.size, *self.shape)), GRID[0], conditions), conditions

    def student_loss(self, batch: Batch, x: Tensor, conditions: Conditions) -> Tensor:
        """L_vsd: its gradient at x is d / x.numel(), and neither score gets one."""
        c = self.config
        t = c.t_min + (c.t_max - c.t_min) * batch.rand(batch.size)
        return matching_loss(x, t, batch.randn(*x.shape), conditions, self.teacher, self.fake, guidance_scale=self.scale,
                             fake_guidance_scale=self.fake_scale, weighting=c.weighting, floor=c.norm_floor)  # fmt: skip

    def fake_loss(self, batch: Batch, x: Tensor, conditions: Conditions) -> Tensor:
        """L_lora on x, which is held fixed."""
        c = self.config
        assert self.fake is not None
        t = T_MIN + (1 - T_MIN) * batch.rand(batch.size)
        noise = batch.randn(*x.shape)
        if self.fake_scale != 1 and float(batch.rand(1)) < c.null_prob:
            conditions = conditions.null()
        loss = weighted_noise_loss if c.fake_weighting == "alpha^2" else fake_score_loss
        return loss(self.fake, x, t, noise, conditions)

    def distilled(self) -> FewStepStudent:
        return FewStepStudent(self.average, {1: GRID}, self.shape)
