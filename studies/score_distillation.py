"""The family of score distillation on mixture2d, scored along its trainings: `make studies` writes leaderboards/mixture2d/studies/.

score-distillation   the methods of the family from one initial student: distance and coverage against passes
divergences          f_distill under each divergence, from the common start and from a student that has dropped half of the modes
backtracking         disback against diff_instruct, from the common start and from one that lies beside the data
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distillbench import __version__
from distillbench.budget import Budget
from distillbench.data.mixture import Mixture, exact_denoiser, standard_mixture
from distillbench.jobs import Job, resolve
from distillbench.report.studies import Dot, Study, StudyPanel
from distillbench.tracks import get_track
from distillbench.training.followed import Look, followed

TRACK = "mixture2d"
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
SCORES = (("sliced-w2", False), ("coverage", True))
LEVEL = "2.5"  # at which every student is called, as papers give it for data of deviation 0.5
TIME = str(5 / 6)  # the same level on the teacher's path, the data's deviation being 1
STARTS_AT = {"dmd": {"start": TIME}, "dmd2": {"grid": TIME}, "f_distill": {"grid": TIME}, "diff_instruct": {"sigma_init": LEVEL},
             "sid": {"sigma_init": LEVEL}, "disback": {"sigma_init": LEVEL}}  # fmt: skip
DIVERGENCES = {"rkl": "reverse KL", "sf": "softened reverse KL", "js": "Jensen-Shannon", "sh": "squared Hellinger", "kl": "forward KL",
               "jf": "Jeffreys"}  # fmt: skip
KEPT = 2  # modes of each class, of four, that the second start of `divergences` knows
ASIDE = 1.0  # by which the second start of `backtracking` is moved, in deviations of the data


class Line(NamedTuple):
    """One line of a figure: a method with its knobs, from a start."""

    panel: str
    label: str
    method: str
    knobs: Mapping[str, str]
    start: str = "common"


def lines_of(study: str) -> list[Line]:
    if study == "score-distillation":
        return [Line("", method, method, {}) for method in STARTS_AT]
    if study == "divergences":
        return [
            Line(f"{start} start", label, "f_distill", {"divergence": name}, start)
            for start in ("common", "half of the modes")
            for name, label in DIVERGENCES.items()
        ]
    pair = (("disback", "disback", {}), ("diff_instruct", "diff_instruct", {"weighting": "inv_l1"}))
    return [Line(f"{start} start", label, method, knobs, start) for start in ("common", "displaced") for label, method, knobs in pair]


STUDIES = {
    "score-distillation": (
        "Score distillation from one initial student",
        "Every student is the teacher's network, called once at the same noise level; at 0 passes none has been trained.",
    ),
    "divergences": (
        "f-distill by divergence",
        "On the left from the teacher's network, on the right from a student that was first distilled to half of each class's modes: "
        "coverage says how many modes have their share of the samples.",
    ),
    "backtracking": (
        "Distribution backtracking against the same loss with a fixed teacher",
        "diff_instruct has DMD's normaliser, as disback has; the passes of disback include the recording of its path. On the right the "
        f"initial student's samples are moved by {ASIDE:g} deviation of the data.",
    ),
}  # fmt: skip


# ---------------------------------------------------------------------- starts


@cache
def half_of_the_modes() -> dict[str, torch.Tensor]:
    """Weights of a one-step student that knows the first modes of each class: diff_instruct with their exact score as its teacher."""
    whole = standard_mixture()
    weights = whole.weights[:, :KEPT] / whole.weights[:, :KEPT].sum(1, keepdim=True)
    teacher = exact_denoiser(Mixture(whole.means[:, :KEPT], whole.covariances[:, :KEPT], weights), get_track(TRACK).teacher().path)
    found = resolve(Job("diff_instruct", TRACK, steps=(1,), settings={"sigma_init": LEVEL}))

    def exchange(method: Any) -> None:
        method.teacher = teacher

    method, _ = followed(found.method_class, found.config, get_track(TRACK), Budget("start", 1500, "steps"), (), prepare=exchange)
    return method.average.state_dict()


def prepared(start: str) -> Callable[[Any], None] | None:
    """What gives a method that start: student, average and fake score alike."""
    if start == "half of the modes":

        def load(method: Any) -> None:
            for network in (method.student, method.average, method.fake):
                network.load_state_dict(half_of_the_modes())

        return load
    return displace if start == "displaced" else None


def displace(method: Any) -> None:
    """Move what the student predicts: its output is a velocity, noise - x0 on the flow path, so x0 at time t moves by -t times its bias."""
    for network in (method.student, method.average):
        last = [module for module in network.network.modules() if isinstance(module, torch.nn.Linear)][-1]
        with torch.no_grad():
            last.bias -= ASIDE / float(TIME)


# ---------------------------------------------------------------------- trainings


def trained(task: tuple[Line, int, str]) -> list[Look]:
    line, seed, budget = task
    torch.set_num_threads(1)
    job = Job(line.method, TRACK, budget, seed, (1,), settings={**STARTS_AT[line.method], **line.knobs})
    found = resolve(job)
    assert found.record.budget is not None
    amount = Budget(budget, found.record.budget["amount"], found.record.budget["unit"])
    return followed(found.method_class, found.config, get_track(TRACK), amount, SHARES, seed=seed, prepare=prepared(line.start))[1]


def made(name: str, seeds: int, budget: str, jobs: int) -> Study:
    """Trains every line with every seed; equal seeds are equal starts."""
    lines = lines_of(name)
    tasks = [(line, seed, budget) for line in lines for seed in range(seeds)]
    looks: list[list[Look]] = []
    with get_context("spawn").Pool(jobs) as pool:
        for (line, seed, _), found in zip(tasks, pool.imap(trained, tasks), strict=True):
            looks.append(found)
            told = f"{line.panel} {line.label} seed {seed}: sliced-w2 {found[-1].scores['sliced-w2']:.4f}"
            print(f"{name}: {len(looks)} of {len(tasks)}, {told}", flush=True)
    by_line = {line[:2]: looks[k * seeds : (k + 1) * seeds] for k, line in enumerate(lines)}
    titles = list(dict.fromkeys(line.panel for line in lines))
    panels = [
        StudyPanel(title, score, higher, {label: dots(score, runs) for (panel, label), runs in by_line.items() if panel == title})
        for score, higher in SCORES
        for title in titles
    ]
    title, text = STUDIES[name]
    return Study(name, title, text, get_track(TRACK).id, seeds, "make studies", __version__, 2, tuple(panels))


def dots(score: str, runs: Sequence[Sequence[Look]]) -> tuple[Dot, ...]:
    """Mean, least and largest over seeds of what was seen at the same share of the budget."""
    found = []
    for looks in zip(*runs, strict=True):
        passes = sum(look.passes for look in looks) / len(looks)
        values = [look.scores[score] for look in looks]
        found.append(Dot(round(passes), sum(values) / len(values), min(values), max(values)))
    return tuple(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", default=list(STUDIES), help=", ".join(STUDIES))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--budget", default="S")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("leaderboards/mixture2d/studies"))
    options = parser.parse_args()
    for name in options.studies:
        if name not in STUDIES:
            parser.error(f"there is no study {name!r}; choose of {', '.join(STUDIES)}")
    for name in options.studies:
        print(made(name, options.seeds, options.budget, options.jobs).write(options.out))


if __name__ == "__main__":
    main()
