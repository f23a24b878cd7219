"""What a board must know of a track without loading it: plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import unknown


@dataclass(frozen=True)
class TrackFacts:
    """id: name@version.  main: the score that ranks.  columns: scores in the order of a board.

    glossary: what the scores mean, one line.  teacher: the teacher in a few words.  solver: of its rows.
    budgets: teacher passes under S, M and L.  latency_batch: the batch of the track's second latency column.
    tuned_on: the distance that tuning minimises; it sees a student that leaves modes out.  claim_seeds: fewest that decide a claim.
    """

    id: str
    title: str
    main: str
    columns: tuple[str, ...]
    glossary: str
    teacher: str
    budgets: dict[str, float]
    latency_batch: int
    tuned_on: str
    claim_seeds: int
    solver: str = "ddim"

    @property
    def name(self) -> str:
        return self.id.partition("@")[0]


FACTS: dict[str, TrackFacts] = {
    "mixture2d": TrackFacts(
        id="mixture2d@1",
        title="a class-conditional mixture of 32 Gaussians in the plane, truth known",
        main="in-mode",
        columns=("in-mode", "sliced-w2", "mode-tv", "within-w2", "coverage", "class-acc", "fidelity-w2"),
        glossary=(
            "in-mode: samples inside a mode of their class; sliced-w2, within-w2: Wasserstein distance to the truth, overall and within "
            "modes; mode-tv: error of the modes' masses (total variation); coverage: modes reached; class-acc: samples that the exact "
            "posterior gives their class; fidelity-w2: distance to the teacher's own samples"
        ),
        teacher="MLP fitted to the exact score",
        budgets={"S": 4e6, "M": 1.6e7, "L": 6.4e7},
        latency_batch=256,
        tuned_on="sliced-w2",
        claim_seeds=8,
    ),
    "digits": TrackFacts(
        id="digits@1",
        title="handwritten digits, 28x28, by class",
        main="fd",
        columns=("fd", "fd-inf", "precision", "recall", "density", "coverage", "label-agreement", "diversity", "nearest", "fidelity-fd"),
        glossary=(
            "fd: Fréchet distance to held-out digits on an embedded classifier's features (not FID); fd-inf: fd at infinitely "
            "many samples; precision, density: samples near real digits; recall, coverage: real digits near samples; label-agreement: "
            "samples that the classifier gives their class; diversity: distance within a class; nearest: distance to the "
            "nearest training image; fidelity-fd: fd to the teacher's samples"
        ),
        teacher="flow transformer trained on 4,000 digits",
        budgets={"S": 1.5e5, "M": 6e5, "L": 2.4e6},
        latency_batch=16,
        tuned_on="fd",
        claim_seeds=5,
    ),
}


def _validation(facts: TrackFacts) -> TrackFacts:
    name, _, version = facts.id.partition("@")
    return replace(facts, id=f"{name}{VALIDATES}@{version}", title=f"what {name} is tuned on: other noise, another reference",
                   main=facts.tuned_on, columns=(facts.tuned_on,), budgets={"S/4": facts.budgets["S"] / 4})  # fmt: skip


VALIDATES = "-validation"  # what the name of a track's validation split ends in; no board shows it
VALIDATION = {f"{name}{VALIDATES}": _validation(facts) for name, facts in FACTS.items()}


def facts_of(track: str) -> TrackFacts:
    """The facts of a track by name or name@version; raises `UsageError` with the nearest names."""
    name = track.partition("@")[0]
    known = FACTS | VALIDATION
    if name not in known or track not in (name, known[name].id):
        raise unknown("track", track, [facts.id if "@" in track else key for key, facts in FACTS.items()])
    return known[name]
