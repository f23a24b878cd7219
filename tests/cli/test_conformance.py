"""The kit passes a method that conforms, and of one that does not, exactly the check that is meant fails."""

from __future__ import annotations

import pytest

import method_files
from distillbench.conformance import check_method
from method_files import in_build, in_loss, in_student

TITLES = [
    "stages", "state round trip", "kill and resume", "no global randomness", "sample i depends on seed i alone", "declared steps work",
    "budget kept", "student without pickle", "needs declared",
]  # fmt: skip

# name -> what is wrong with it, the checks that fail, and a word of the reason
BAD = {
    "data undeclared": ([in_loss("x, conditions = batch.data()")], {"needs declared"}, "uses 'real data', but its needs do not name it"),
    "surgery undeclared": (
        [in_build("self.narrow = context.teacher.network.with_second_time()")],
        {"needs declared"},
        "uses 'second time'",
    ),
    "taps undeclared": (
        [in_loss("self.teacher.features(x, t, conditions, self.teacher.network.tap_names[:1])")],
        {"needs declared"},
        "uses 'taps'",
    ),
    "derivatives undeclared": (
        [in_loss("torch.func.jvp(lambda x: self.teacher.velocity(x, t, conditions), (x,), (x,))")],
        {"needs declared"},
        "uses 'jvp'",
    ),
    # A generator that no checkpoint holds cannot be resumed either.
    "torch's generator": ([in_loss("x = torch.randn(batch.size, 2)")], {"no global randomness", "kill and resume"}, "generator of torch"),
    "Python's generator": ([in_loss("x = x * random.random()")], {"no global randomness", "kill and resume"}, "generator of random"),
    "global noise in a sample": (
        [in_student("def generate(self, conditions, **options):\n    torch.rand(1)\n    return super().generate(conditions, **options)")],
        {"no global randomness"},
        "generator of torch",
    ),
    "state elsewhere": (
        [in_build("self.seen = [0]"), in_loss("self.seen[0] += 1\nx = x * self.seen[0]")],
        {"kill and resume"},
        "no module, tensor or number in vars(self)",
    ),
    "pickle": (
        [in_student("def save(self, folder):\n    super().save(folder)\n    torch.save([], folder / 'extra.pt')")],
        {"student without pickle"},
        "extra.pt",
    ),
    "forgets": (
        [in_student("def extra_config(self):\n    self.mode = 'deterministic'\n    return {'mode': 'renoise'}"), ],
        {"student without pickle"},
        "other samples at 2 steps",
    ),
    "looks at its neighbours": (
        [in_student("def generate(self, conditions, **options):\n    samples = super().generate(conditions, **options)\n"
                    "    return Samples(samples.x - samples.x.mean(0), samples.evaluations)")],
        {"sample i depends on seed i alone"},
        "with the batch that it is in",
    ),
    "promises steps": ([("for n in self.steps", "for n in self.steps if n < 2")], {"declared steps work"}, "2 steps are declared"),
    "understates": (
        [in_student("def generate(self, conditions, **options):\n    return Samples(super().generate(conditions, **options).x, 1)")],
        {"declared steps work"},
        "2 steps say 1 evaluations, spend 2",
    ),
    "moody stages": (
        [("        turn = Turn(", "        self.calls = getattr(self, 'calls', 0) + 1\n        turn = Turn("),
         ('Stage("regression"', 'Stage(f"regression {self.calls}"')],
        {"stages"},
        "must be pure",
    ),
    "hides modules": ([in_build("self.many = [context.teacher.copy()]")], {"stages"}, "plain list of modules"),
    "bare knob": ([("knob(None, \"nothing\", low=0)", "None")], {"card"}, "knobs without a word of documentation: start"),
    "data access": ([('data_access="conditions"', 'data_access="real"')], {"card"}, "do not name 'real data'"),
}  # fmt: skip


def checked(file) -> tuple[dict[str, str], list[str], list[str]]:
    """What failed, with the reasons; what passed; what was not reached."""
    results = list(check_method(str(file), tracks=("mixture2d",)))
    names = [(result, result.name.removeprefix("mixture2d@1: ")) for result in results]
    return (
        {name: result.detail for result, name in names if not result.passed},
        [name for result, name in names if result.passed and not result.skipped],
        [name for result, name in names if result.skipped],
    )


def test_a_conforming_method_passes_everything(tmp_path):
    failed, passed, skipped = checked(method_files.write(tmp_path / "tiny.py"))
    assert (failed, passed, skipped) == ({}, ["card", *TITLES], [])


@pytest.mark.parametrize("name", BAD)
def test_exactly_the_matching_check_fails(tmp_path, name):
    changes, expected, told = BAD[name]
    failed, _, skipped = checked(method_files.write(tmp_path / "bad.py", *changes))
    assert set(failed) == expected
    assert all(told in detail for detail in failed.values()), failed
    assert skipped == (TITLES[1:] if expected == {"stages"} else [])


def test_check_on_the_command_line(distillbench, tmp_path, monkeypatch):
    from distillbench import conformance

    monkeypatch.setattr(conformance, "FACTS", {"mixture2d": conformance.FACTS["mixture2d"]})
    good = distillbench("check", method_files.write(tmp_path / "tiny.py"))
    assert (good.status, good.err) == (0, "")
    assert [line[:4] for line in good.out.splitlines()] == ["  ok"] * (1 + len(TITLES))
    bad = distillbench("check", method_files.write(tmp_path / "bad.py", *BAD["pickle"][0]))
    assert bad.status == 1
    assert [line.split(": ")[1] for line in bad.out.splitlines() if line.startswith("FAIL")] == ["student without pickle"]


def test_a_method_for_other_conditions_is_skipped(tmp_path):
    file = method_files.write(tmp_path / "text.py", ('needs=("labels",)', 'needs=("text",)'))
    assert checked(file) == ({}, ["card"], ["mixture2d@1"])
