"""Claims: a paper's headline as "A beats B on M at k evaluations", decided from paired seeds under budget S.

*reproduced* if the paired 95 % interval of the effect lies wholly past the claim's margin and stays there under Holm's correction over the
claims of its method, *not reproduced* if wholly below it in the same way, else *undecided*.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .discovery import Found, discover, find
from .errors import UsageError
from .info import Claim
from .jobs import STEPS, TEACHER, Job, resolve
from .records import RunRecord
from .statistics import Interval, holm, paired_comparison
from .store import Store
from .tracks import get_track
from .tracks.facts import facts_of

REPRODUCED, NOT_REPRODUCED, UNDECIDED, NOT_RUN = "reproduced", "not reproduced", "undecided", "not run"
BUDGET, LEVEL = "S", 0.05

_SIDE = re.compile(r"([\w.-]+)(?:\((.*)\))?")
_SETTING = re.compile(r"(\w+)=(.*?)(?:,(?=\w+=)|$)")


@dataclass(frozen=True)
class Decision:
    """What the records say of one claim.

    effect: how much better `better` is than `worse` on the metric, in its unit, positive in the claim's favour; None if not run.
    p: of the paired t test that the effect is the margin, two-sided; p_adjusted: after Holm's correction over the method's claims.
    verdict: one of the four words above.  n: paired seeds.  why: what is missing, or what stands against a decision.
    """

    method: str
    number: int  # of the claim in the method's card, from 1
    claim: Claim
    track: str  # name@version
    verdict: str
    n: int
    effect: Interval | None
    p: float | None
    p_adjusted: float | None
    why: str = ""


@dataclass(frozen=True)
class Side:
    """One side of a claim: a method with changed knobs, or the teacher."""

    target: str
    settings: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Side:
        """From `cd`, `cd(points=8)`, `cd(w_range=5,15,lr=1e-3)` or `teacher`."""
        match = _SIDE.fullmatch(text.strip())
        settings = dict(_SETTING.findall(match[2] or "")) if match else {}
        if match is None or (match[2] and not settings) or (match[1] == TEACHER and settings):
            raise UsageError(f"{text!r} is no side of a claim; write a method, method(knob=value,...) or teacher")
        return cls(match[1], settings)

    def job(self, claim: Claim, seed: int) -> Job:
        """What must have run for this side: the job that a bench would make, so that it is run once."""
        track = facts_of(claim.track).name
        if self.target == TEACHER:
            return Job(TEACHER, track, steps=get_track(track).reference_steps)
        info = find(self.target).info
        if claim.steps not in info.steps:
            raise UsageError(f"a claim is about {self.target} at {claim.steps} steps, which it is not made for")
        usual = tuple(n for n in STEPS if n in info.steps)
        steps = (claim.steps,) if info.per_step or claim.steps not in usual else usual
        return Job(self.target, track, BUDGET, seed, steps, self.settings)


def methods_with_claims(method: str | None = None) -> dict[str, Found]:
    """The method asked for, or every installed one."""
    return discover() if method is None else {find(method).info.id: find(method)}


def jobs_of(claims: Iterable[Claim], seeds: int | None = None) -> list[Job]:
    """Every job that the claims stand on, each once, seed by seed; `seeds` None: as many as the track asks for."""
    jobs: dict[str, Job] = {}
    chosen = list(claims)
    for seed in range(max((seeds or facts_of(claim.track).claim_seeds for claim in chosen), default=0)):
        for claim in chosen:
            if seed < (seeds or facts_of(claim.track).claim_seeds):
                for side in (claim.better, claim.worse):
                    job = Side.parse(side).job(claim, seed)
                    jobs.setdefault(resolve(job).record.id, job)
    return list(jobs.values())


def decided(stores: Sequence[Store], methods: Mapping[str, Found] | None = None, track: str | None = None,
            seeds: int | None = None) -> list[Decision]:  # fmt: skip
    """The claims of the methods (on one track), decided from the records in the stores."""
    records = {record.id: record for store in stores for record in store.records()}
    found: list[Decision] = []
    for name, method in (methods_with_claims() if methods is None else methods).items():
        mine = [
            _decide(name, number, claim, records, seeds)
            for number, claim in enumerate(method.info.claims, start=1)
            if track in (None, facts_of(claim.track).name, facts_of(claim.track).id)
        ]
        found += corrected(mine)
    return found


def _decide(method: str, number: int, claim: Claim, records: Mapping[str, RunRecord], seeds: int | None) -> Decision:
    """Without Holm's correction, whose verdict comes when all claims of the method are known."""
    facts = facts_of(claim.track)
    wanted = seeds or facts.claim_seeds
    empty = Decision(method, number, claim, facts.id, NOT_RUN, 0, None, None, None)
    values, higher = [], True
    for text in (claim.better, claim.worse):
        side = Side.parse(text)
        by_seed: dict[int, float] = {}
        for seed in range(wanted):
            record = records.get(resolve(side.job(claim, seed)).record.id)
            if record is not None and not record.ok:
                return replace(empty, why=f"{text}, seed {seed}: {record.status}")
            scores = record.scores.get(str(claim.steps), []) if record is not None else []
            score = next((score for score in scores if score["name"] == claim.metric), None)
            if score is not None and score["value"] is not None:
                by_seed[seed], higher = float(score["value"]), score["higher_is_better"] is not False
        values.append(by_seed)
    sign = 1.0 if higher else -1.0
    better, worse = ({seed: sign * value for seed, value in side.items()} for side in values)
    comparison = paired_comparison(better, worse, margin=claim.margin)
    if comparison is None or comparison.p is None:
        return replace(empty, why=f"needs {wanted} seeds of {claim.better} and {claim.worse}: distillbench claims {method}")
    two_sided = 2 * min(comparison.p, 1 - comparison.p)
    short = comparison.n < facts.claim_seeds
    why = f"{comparison.n} of {facts.claim_seeds} seeds" if short else ""
    return Decision(method, number, claim, facts.id, UNDECIDED, comparison.n, comparison.interval, two_sided, None, why)


def corrected(decisions: Sequence[Decision]) -> list[Decision]:
    """The same decisions with Holm's correction over those that were run, and the verdict that it leaves."""
    adjusted = holm({decision.number: decision.p for decision in decisions if decision.p is not None})
    found = []
    for decision in decisions:
        if decision.effect is None:
            found.append(decision)
            continue
        p = adjusted[decision.number]
        past = decision.effect.value > decision.claim.margin
        sure = p < LEVEL and not decision.why
        verdict = UNDECIDED if not sure else REPRODUCED if past else NOT_REPRODUCED
        found.append(replace(decision, p_adjusted=p, verdict=verdict))
    return found
