"""DistillSpec (Zhou et al. 2023, arXiv 2310.08461) on the contract: a sketch, checked but not benchmarked.

Teach a small draft model the next-token law of a large target, on text that the draft, the target or nobody wrote.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from distillbench.api import Batch, Conditions, Context, Method, MethodInfo, OptimizerConfig, Samples, Stage, Student, Turn
from distillbench.randomness import generator_for

TARGET, DRAFT = 0, 1


class LanguageModel(nn.Module, ABC):
    """What the language domain offers. A text is (length,) tokens: a prompt of `prompt_length` tokens, its completion, zeros."""

    end: int

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (n, length, vocabulary) of the next token."""

    @abstractmethod
    def draft(self) -> LanguageModel:
        """A trainable copy of the undistilled draft that is shipped beside the target."""

    @abstractmethod
    def write(self, prompts: Conditions, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Texts (n, length) that complete the prompts."""

    @abstractmethod
    def save(self, folder: Path) -> None: ...

    @classmethod
    @abstractmethod
    def load(cls, folder: Path) -> LanguageModel: ...


def completion(tokens: Tensor, prompt_length: Tensor, end: int) -> Tensor:
    """True on the completion, its first end token included."""
    written = torch.arange(tokens.shape[1], device=tokens.device) >= prompt_length[:, None]
    ends = ((tokens == end) & written).long()
    return written & (ends.cumsum(1) - ends == 0)


def skewed(p: Tensor, q: Tensor, beta: float = 0.5) -> Tensor:
    m = torch.logaddexp(p + torch.tensor(beta).log(), q + torch.tensor(1 - beta).log())
    return beta * (p.exp() * (p - m)).sum(-1) + (1 - beta) * (q.exp() * (q - m)).sum(-1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of log-probabilities: target p, draft q
    "fkl": lambda p, q: (p.exp() * (p - q)).sum(-1),
    "rkl": lambda p, q: (q.exp() * (q - p)).sum(-1),
    "jsd": skewed,
    "tvd": lambda p, q: 0.5 * (p.exp() - q.exp()).abs().sum(-1),
}


class DraftStudent(Student):
    """A draft model. `steps` are the tokens drafted in a block; the track decodes with draft and target together and scores that."""

    def __init__(self, draft: LanguageModel, steps: tuple[int, ...]):
        self.draft, self.steps = draft, steps

    def generate(self, conditions: Conditions, *, steps: int, seeds: Sequence[int], guidance: float | None = None,
                 negative: Conditions | None = None) -> Samples:  # fmt: skip
        texts = [self.draft.write(conditions[[i]], generator_for(seed, "text", 0)) for i, seed in enumerate(seeds)]
        return Samples(torch.cat(texts), evaluations=texts[0].shape[1])

    def save(self, folder: Path) -> None:
        self.draft.save(folder)

    @classmethod
    def load(cls, folder: Path) -> DraftStudent:
        return cls(LanguageModel.load(folder), (2, 4, 8))


class DistillSpec(Method):
    info = MethodInfo(
        id="distillspec", version=1, title="DistillSpec", paper="arXiv 2310.08461", year=2023, family="knowledge distillation",
        domain=("language",), needs=(), data_access="real and teacher samples", steps=(2, 4, 8),
    )  # fmt: skip
    student_type = DraftStudent

    @dataclass(frozen=True)
    class Config:
        """data: fixed, target, draft or mixed (`draft_share` of it the draft's).  refresh: updates a draft text.  kept: texts."""

        data: str = "draft"
        divergence: str = "fkl"
        draft_share: float = 0.5
        refresh: int = 4
        kept: int = 1024
        writing: float = 0.3  # largest share for the target's texts
        temperature: float = 1.0
        lr: float = 1e-3

    config: Config

    def build(self, context: Context) -> None:
        self.teacher: LanguageModel = context.teacher
        self.draft = self.teacher.draft()
        self.texts = torch.zeros(2, self.config.kept, *context.shape, dtype=torch.int64)
        self.prompts = torch.zeros(2, self.config.kept, dtype=torch.int64)
        self.written = torch.zeros(2, dtype=torch.int64)
        self.steps = context.steps

    def stages(self) -> list[Stage]:
        c, stages = self.config, []
        if c.data in ("target", "mixed"):
            turn = Turn("target text", partial(self.write, TARGET, self.teacher))
            stages.append(Stage("target text", c.writing, [turn], done=lambda: int(self.written[TARGET]) >= c.kept))
        own = [Turn("draft text", partial(self.write, DRAFT, self.draft))] if c.data in ("draft", "mixed") else []
        rate = OptimizerConfig(c.lr, betas=(0.9, 0.98), clip=1.0, warmup=0.05, decay="cosine", floor=0.1)
        distil = Turn("distil", self.distil, {"draft": self.draft}, repeat=c.refresh if own else 1, optimizer={"draft": rate})
        stages.append(Stage("distil", 1.0 - sum(s.share for s in stages), [*own, distil]))
        return stages

    def write(self, author: int, model: LanguageModel, batch: Batch) -> None:
        """Work: a batch of texts into the author's ring, at places that follow from the turn's count alone."""
        prompts = batch.conditions()
        places = (batch.count * batch.size + torch.arange(batch.size)) % self.config.kept
        with torch.no_grad():
            self.texts[author, places] = model.write(prompts, batch.generator, self.config.temperature).cpu()
        self.prompts[author, places] = prompts.field("prompt_length").cpu()
        self.written[author] = (batch.count + 1) * batch.size

    def examples(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Texts (n, length) and the lengths of their prompts."""
        if self.config.data == "fixed":
            texts, conditions = batch.data()
            return texts, conditions.field("prompt_length")
        share = {"target": 0.0, "draft": 1.0, "mixed": self.config.draft_share}[self.config.data]
        author = (batch.rand(batch.size).cpu() < share).long()
        place = (batch.rand(batch.size).cpu() * self.written.clamp_max(self.config.kept)[author]).long()
        return self.texts[author, place], self.prompts[author, place]

    def distil(self, batch: Batch) -> Tensor:
        """The divergence of target and draft, averaged over each completion, then over texts."""
        texts, prompt_length = self.examples(batch)
        keep = completion(texts, prompt_length, self.teacher.end)[:, 1:]
        with torch.no_grad():
            p = self.teacher(texts)[:, :-1].log_softmax(-1)
        q = self.draft(texts)[:, :-1].log_softmax(-1)
        distance = DIVERGENCES[self.config.divergence](p, q)
        return ((distance * keep).sum(1) / keep.sum(1).clamp_min(1)).mean()

    def distilled(self) -> DraftStudent:
        return DraftStudent(self.draft, self.steps)
