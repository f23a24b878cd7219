"""Captions that a stranger understands without having read anything else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..leaderboard import Board
from ..leaderboard.texts import count_text
from ..listing import metric_rows
from ..tracks.facts import TrackFacts
from .curves import RESAMPLES, Panel, Place, most_evaluations
from .prompts import PromptGrid
from .samples import Grid

BRIEF = {"sliced-w2": "Wasserstein distance between the samples and the truth"}  # the glossary tells of two scores at once
PASS = "one pass is the arithmetic of one forward of the teacher's network on one example"


def about(board: Board) -> list[str]:
    """Two sentences: what the track is, and who the teacher is."""
    facts = board.facts
    most = most_evaluations(board)
    needs = f", which needs about {most} network evaluations for a good sample" if most else ""
    budgets = ", ".join(f"{name} = {count_text(passes)}" for name, passes in facts.budgets.items())
    return [
        f"Students learn to sample from {facts.title}.",
        f"The teacher is {_article(facts.teacher)}{needs}; a method turns it into a student that needs a few, within a budget of "
        f"teacher passes ({budgets}; {PASS}).",
    ]


def _article(text: str) -> str:
    """ "an MLP", "a flow transformer": M is spoken with a vowel."""
    return ("an " if text[:1].lower() in "aeio" or text[:3] == "MLP" else "a ") + text


def meaning(facts: TrackFacts, name: str) -> str:
    told = BRIEF.get(name) or next((row["meaning"] for row in metric_rows() if row["track"] == facts.id and row["name"] == name), "")
    return f"{name} ({told})" if told else name


def listed(words: Iterable[str], last: str = "and") -> str:
    found = list(words)
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} {last} {found[-1]}" if found else ""


def of_passes(board: Board, table: Sequence[Sequence[Panel]]) -> str:
    facts, most = board.facts, most_evaluations(board)
    marks = [mark for line in table for panel in line for marks in panel.lines.values() for mark in marks]
    seeds = sorted({mark.seeds for mark in marks})
    evaluations = listed((str(panel.evaluations) for panel in table[0]), "or")
    scores = "; ".join(f"{meaning(facts, line[0].score)}: {_better(line[0].higher_is_better)}" for line in table)
    words = [
        f"Quality against training budget on {facts.id}. Each panel shows students that make a sample with {evaluations} network",
        f"evaluations. Across: the budget under which each student was trained, in teacher passes ({PASS}; logarithmic). Up: {scores}.",
        f"Marks are means over training seeds ({_range(seeds)}); bands and whiskers are 95 % intervals over those seeds"
        + (", or over samples where there is one seed." if 1 in seeds else "."),
        "Dashed: the teacher with as many evaluations (where it lies off the scale, its value stands at the edge); dash-dotted: the "
        f"teacher with {most} evaluations; dotted: truth, the score of a perfect student."
        if most
        else "",
        _trainings(board),
        "Methods with one budget are a single mark. Marks are moved a little sideways so that they do not hide each other.",
        f"The narrow form of this figure shows {table[0][0].score} alone." if len(table) > 1 else "",
    ]
    return " ".join(word for word in words if word)


def _better(higher: bool) -> str:
    return "higher is better" if higher else "lower is better, on a logarithmic axis"


def _trainings(board: Board) -> str:
    runs = [row for row in board.rows if row.competes and row.seeds]
    apart = sorted({row.label for row in runs if row.trainings > 1})
    together = sorted({row.label for row in runs if len(row.trained_for) > 1})
    words = []
    if apart:
        count = max(row.trainings for row in runs if row.trainings > 1)
        words.append(
            f"{listed(apart)} {'train' if len(apart) > 1 else 'trains'} a separate student for each number of evaluations, each under "
            f"the budget shown, so that {count} panels cost {count} times that budget in all"
        )
    if together:
        words.append(f"{listed(together)} {'train' if len(together) > 1 else 'trains'} one student for all panels, under the budget once")
    return "; ".join(words) + "." if words else ""


def _range(numbers: Sequence[int]) -> str:
    return "none" if not numbers else str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def of_latency(board: Board, by_budget: Mapping[str, Sequence[Place]]) -> str:
    facts, batch = board.facts, board.facts.latency_batch
    records = [row.latency[batch] for row in board.rows if batch in row.latency]
    where = listed(sorted({f"{record.device_class}, {record.threads} thread{'s' if record.threads > 1 else ''}" for record in records}))
    rounds = _range(sorted({len(record.seconds) for record in records}))
    return (
        f"Quality against sampling time on {facts.id}, by training budget ({listed(by_budget)}). Across: the median time to sample a "
        f"batch of {batch} ({where}; logarithmic), with whiskers from the 10th to the 90th percentile of {rounds} timed rounds. "
        f"Up: {meaning(facts, facts.main)}, {_better(board.higher_is_better(facts.main) is not False)}, with 95 % intervals over "
        "training seeds (over samples for the teacher and where there is one seed). Lines join the marks of one method from few to many "
        "network evaluations; numbers say how many, for the methods once beside the best of each number. Teacher points that lie off the "
        "scale stand as a line of text at the edge. Thick grey steps: the Pareto front, "
        "the points that no other point beats in time without being worse in quality, or the other way round. How full a mark is says "
        f"how sure its place on the front is: full if it is there in all of {RESAMPLES:,} bootstrap resamples of training seeds and "
        "timing rounds, hollow if in none; the shares are in the table below. Dotted: truth, the score of a perfect student."
        + (f" The narrow form of this figure shows budget {list(by_budget)[-1]} alone." if len(by_budget) > 1 else "")
    )


def of_samples(board: Board, grid: Grid, evaluations: Sequence[int]) -> str:
    what = f"Each panel shows {grid.n:,} samples, a column for each class."
    if grid.points:
        what = f"Each panel shows {grid.n:,} samples as points in the plane, one colour a class; a perfect student's looks like truth."
    return (
        f"Samples on {board.facts.id}. Above: truth, and the teacher with all its evaluations. Below: the teacher and every method "
        f"(trained under budget {grid.budget}, first seed) with {listed(map(str, evaluations))} network evaluations. {what} The teacher "
        "and all students start from the same noise and the same classes, so that the same place in two panels can be compared; truth "
        f"is drawn from the data. Samples are not selected.{_gaps(grid, evaluations)}"
    )


def _gaps(grid: Grid, evaluations: Sequence[int]) -> str:
    whole = all(n in pictures for pictures in grid.rows.values() for n in evaluations)
    return "" if whole else " A dash: no such samples, most often because the method makes one step only."


def of_prompts(board: Board, grid: PromptGrid) -> str:
    return (
        f"The same {len(grid.prompts)} captions on {board.facts.id} by truth, by the teacher and by every method (trained under budget "
        f"{grid.budget}, first seed); the number behind a name is that of network evaluations. A column has one caption and, for teacher "
        "and students, one starting noise. Captions stand evenly spaced in the list that is scored; nothing is selected."
    )


def of_categories(board: Board) -> str:
    return (
        f"What a checker reads right in the images on {board.facts.id}, by category, as GenEval has them. object: every shape asked for is "
        "there; count: as many as asked for; colour: of single objects; position: the place, or how two objects stand to each other; "
        "binding: of two objects each has its own colour. Marks are shares of the images whose caption states it, whiskers 95 % intervals "
        "over captions. Truth is seen through the teacher's autoencoder: it is the ceiling."
    )


CLAIMS = (
    "What the papers claim, tested here. A claim says that one variant (A) beats another (B) on one score at a number of sampling steps, "
    "both trained under budget S on the same seeds. Effect: by how much A is better than B, in the unit of the score, positive in the "
    "claim's favour, with its 95 % paired interval over n shared seeds. Reproduced: the interval lies wholly above the claim's margin; not "
    "reproduced: wholly below, in both cases after the correction for the number of claims; undecided: neither; not run: records are "
    "missing. p is of the paired t test that the effect is the margin; adjusted p counts all claims of the method (Holm)."
)
