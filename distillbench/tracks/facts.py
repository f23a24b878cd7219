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
    extra: the optional packages that it needs, as in `pip install 'distillbench[images]'`.
    folder: of its published records within `leaderboards/`, if it is not the name.
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
    extra: str = ""
    folder: str = ""

    @property
    def name(self) -> str:
        return self.id.partition("@")[0]

    @property
    def home(self) -> str:
        """Where its published records lie within `leaderboards/`."""
        return self.folder or self.name


def _shapes(identity: str, format: str, teacher: str, solver: str, small: float) -> TrackFacts:
    """The facts of one of the two tracks on captioned scenes; what they measure is the same."""
    return TrackFacts(
        id=identity,
        title=f"captioned scenes of coloured shapes, 32x32, teacher in {format}'s format",
        main="fd",
        columns=("fd", "kid", "attributes", "object", "count", "colour", "position", "binding", "whole", "clipcos", "precision", "recall",
                 "density", "coverage", "diversity", "vendi", "fidelity-fd"),
        glossary=(
            "fd, kid: Fréchet and kernel distance to real scenes on ImageNet features (efflite0-b10@64, not FID); attributes: mean of the "
            "five categories; object, count, colour, position and binding: images in which a checker reads right what the caption states; "
            "whole: images with all that the caption says; clipcos: agreement with the caption in a small CLIP trained on scenes; "
            "precision, density: samples near real scenes; recall, coverage: real scenes near samples; diversity: between images of one "
            "caption; vendi: effective number of different images; "
            "fidelity-fd: fd to the teacher's samples"
        ),
        teacher=teacher,
        budgets={"S": small, "M": 4 * small, "L": 16 * small},
        latency_batch=16,
        tuned_on="fd",
        claim_seeds=5,
        solver=solver,
        extra="images",
        folder=identity.partition("@")[0].replace("-", "/"),
    )  # fmt: skip


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
    "shapes-sd": _shapes(
        "shapes-sd@3", "Stable Diffusion", "latent U-Net, text encoder and autoencoder in Stable Diffusion's formats", "DDIMScheduler", 2e5
    ),
    "shapes-sana": _shapes(
        "shapes-sana@3",
        "SANA",
        "latent flow transformer, text encoder and autoencoder in SANA's formats",
        "FlowMatchEulerDiscreteScheduler",
        3e5,
    ),
}


def _published(identity: str, title: str, columns: tuple[str, ...], glossary: str, teacher: str, small: float, batch: int) -> TrackFacts:
    """The facts of a track that scores as papers do; its definition is in the module of its name."""
    stand_in = "fd: the same distance on ImageNet features (efflite0-b10@64, not FID), which need no published weights"
    return TrackFacts(
        id=identity, title=title, main="fid", columns=(*columns, "fd"), glossary=f"{glossary}; {stand_in}", teacher=teacher,
        budgets={"S": small, "M": 4 * small, "L": 16 * small}, latency_batch=batch, tuned_on="fid", claim_seeds=5,
        solver="the pipeline's own scheduler", extra="published",
    )  # fmt: skip


# Tracks whose data, or teacher and data, are the user's own files: none of them is published, so only who names one meets it.
EXTERNAL: dict[str, TrackFacts] = {
    "emoji": TrackFacts(
        id="emoji@1",
        title="Google's emoji with their names as captions, 64x64",
        main="fd",
        columns=("fd", "kid", "label-agreement", "precision", "recall", "density", "coverage", "diversity", "vendi"),
        glossary=(
            "fd, kid: Fréchet and kernel distance to held-out drawings on ImageNet features (efflite0-b10@64, not FID); label-agreement: "
            "samples that a linear classifier on those features gives the category of their caption; precision, density: samples near real "
            "drawings; recall, coverage: real drawings near samples; diversity: between images of one caption; vendi: effective number of "
            "different images"
        ),
        teacher="latent U-Net, text encoder and autoencoder in Stable Diffusion's formats; --teacher for another",
        budgets={"S": 2e5, "M": 8e5, "L": 3.2e6},
        latency_batch=16,
        tuned_on="fd",
        claim_seeds=5,
        solver="DDIMScheduler",
        extra="images",
    ),
    "coco-sd15": _published(
        "coco-sd15@1", "Stable Diffusion 1.5 on 30,000 captions of COCO-2014, 512x512 scored at 256", ("fid", "clip"),
        "fid: FID (clean, Inception-2015) to COCO's images; clip: cosine to the caption in OpenCLIP ViT-g/14, behind 'A photo depicts'",
        "Stable Diffusion 1.5, given as --teacher", 1e6, 8,
    ),
    "coco-sdxl": _published(
        "coco-sdxl@1", "Stable Diffusion XL on 10,000 captions of COCO-2014, 1024x1024", ("fid", "patch-fid", "clip"),
        "fid: FID (clean, Inception-2015) to COCO's images at 512; patch-fid: the same of 299-pixel patches from the middle; clip: cosine "
        "to the caption in OpenCLIP ViT-g/14, behind 'A photo depicts'",
        "Stable Diffusion XL, given as --teacher", 1e6, 4,
    ),
    "mjhq-sana": _published(
        "mjhq-sana@1", "SANA on the 30,000 prompts of MJHQ-30K, 1024x1024", ("fid", "clip", "hps"),
        "fid: FID (legacy_pytorch, Inception-2015) to MJHQ's images at 1024; clip: cosine to the prompt in OpenAI's CLIP ViT-L/14; hps: "
        "HPSv2.1",
        "SANA, given as --teacher", 1e6, 4,
    ),
    "cifar10": _published(
        "cifar10@1", "CIFAR-10 without labels, 50,000 samples against the training set, 32x32", ("fid",),
        "fid: FID (legacy_tensorflow, Inception-2015) to the training images", "a DDPM U-Net, given as --teacher", 1e7, 64,
    ),
}  # fmt: skip


def _validation(facts: TrackFacts) -> TrackFacts:
    name, _, version = facts.id.partition("@")
    return replace(facts, id=f"{name}{VALIDATES}@{version}", title=f"what {name} is tuned on: other noise, another reference",
                   main=facts.tuned_on, columns=(facts.tuned_on,), budgets={"S/4": facts.budgets["S"] / 4})  # fmt: skip


VALIDATES = "-validation"  # what the name of a track's validation split ends in; no board shows it
VALIDATION = {f"{name}{VALIDATES}": _validation(facts) for name, facts in FACTS.items()}


def facts_of(track: str) -> TrackFacts:
    """The facts of a track by name or name@version; raises `UsageError` with the nearest names."""
    name = track.partition("@")[0]
    known = FACTS | EXTERNAL | VALIDATION
    if name not in known or track not in (name, known[name].id):
        raise unknown("track", track, [facts.id if "@" in track else key for key, facts in (FACTS | EXTERNAL).items()])
    return known[name]
