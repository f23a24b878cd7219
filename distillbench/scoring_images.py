"""Scores a folder of images against a folder of real ones, without a track. Read as a stream, features kept by content. docs/score.md."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data.image_folder import ImageFolder, set_sha256
from .errors import UsageError, unknown
from .metrics.arrays import as_float64
from .metrics.extractors import Extractor, embedded_extractor
from .metrics.feature_cache import FolderFeatures, features_of_folder
from .metrics.images import DENSITY_NEIGHBOURS, Reference, image_scores, seen_features
from .metrics.published import not_run
from .metrics.published.clip import CLIPS, ClipScore
from .metrics.published.hps import VERSIONS, HpsScore
from .metrics.published.inception import MODES, Inception, fid_score
from .metrics.score import Score
from .published_weights import WeightsMissing, find
from .records import RunRecord, environment, now, run_id
from .runner import Report
from .scoring import RELEASED, plain_name
from .store import Store

TRACK = "images@1"  # no track of a board: records that stand for themselves
EMBEDDED = ("fd", "kid", "precision", "recall", "density", "coverage", "vendi")
PER_CAPTION = ("diversity",)
FIDS = {f"fid/{mode}-inception2015@299": mode for mode in MODES}
CLIP_SCORES = {f"clipcos/{name}": name for name in CLIPS}
HPS_SCORES = {f"hps/{version}-openclip-h14": version for version in VERSIONS}
# A published score -> the weights that it needs.
WEIGHTS_OF = {**{name: MODES[mode][0] for name, mode in FIDS.items()}, **CLIP_SCORES, **{n: f"hps-{v}" for n, v in HPS_SCORES.items()}}
WITH_CAPTIONS = (*PER_CAPTION, *CLIP_SCORES, *HPS_SCORES)
METRICS = (*EMBEDDED, *FIDS, *WITH_CAPTIONS)
FEATURES = "features"  # the folder of the store in which features are kept
FEWEST = DENSITY_NEIGHBOURS + 1


@dataclass(frozen=True)
class Folders:
    """What is scored. captions: one for each image, in order, or none.  metrics: names of METRICS.  weights: a folder, or None."""

    images: ImageFolder
    reference: ImageFolder
    captions: tuple[str, ...]
    metrics: tuple[str, ...]
    weights: Path | None

    @property
    def captions_sha256(self) -> str | None:
        return hashlib.sha256("\n".join(self.captions).encode()).hexdigest() if self.captions else None

    @property
    def about(self) -> list[str]:
        """What was read, converted and left aside, a line for each folder."""
        return [f"{folder.folder}: {folder.summary()}" for folder in (self.images, self.reference)]

    @property
    def note(self) -> str:
        """What had to be converted."""
        told = []
        for what, folder in (("images", self.images), ("reference", self.reference)):
            counts = ", ".join(f"{count} {kind}" for kind, count in sorted(folder.converted.items()))
            told += [f"{what} converted: {counts}"] if counts else []
        return "; ".join(told)


def open_folders(
    images: str | Path, reference: str | Path, *, captions: str | Path | None = None, n: int | None = None, resize: int | None = None,
    metrics: Sequence[str] | None = None, weights: str | Path | None = None,
) -> Folders:  # fmt: skip
    """Look at the folders and files, and refuse in one line what cannot be scored.

    n: how many images are scored, the first by name; all of the reference are taken.  resize: the side to which all are brought.
    metrics: None for all that can be asked for.
    """
    for name in metrics or ():
        if name not in METRICS:
            raise unknown("metric of images", name, METRICS)
        if name in WITH_CAPTIONS and captions is None:
            raise UsageError(f"{name} needs captions: give --captions FILE")
    if weights is not None and not Path(weights).is_dir():
        raise UsageError(f"--weights {weights}: no such folder; docs/metrics-published.md says what belongs into it")
    ours, theirs = ImageFolder(images, n=n, resize=resize), ImageFolder(reference, resize=resize)
    for folder in (ours, theirs):
        folder.require()
        if len(folder) < FEWEST:
            raise UsageError(f"{folder.folder} gives {len(folder)} images, and at least {FEWEST} are needed to compare two sets")
    if ours.size != theirs.size:
        sizes = [f"{h} x {w}" for h, w in (ours.size, theirs.size)]
        raise UsageError(f"the images are {sizes[0]} pixels and the reference {sizes[1]}: give --resize, so that both are brought to one")
    told = () if captions is None else read_captions(Path(captions), ours)
    chosen = tuple(dict.fromkeys(metrics)) if metrics else tuple(name for name in METRICS if told or name not in WITH_CAPTIONS)
    return Folders(ours, theirs, told, chosen, None if weights is None else Path(weights))


def read_captions(path: Path, images: ImageFolder) -> tuple[str, ...]:
    """The caption of each image: a line each in the order of the names, or as .jsonl {"caption": ...}, with "file": its name if wanted."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UsageError(f"{path}: the captions cannot be read ({why})") from None
    rows = [_caption(path, number, line) for number, line in enumerate(lines, start=1)]
    named = {file: caption for file, caption in rows if file is not None}
    if named:
        missing = [name for name in images.names if name not in named]
        if len(named) != len(rows) or missing:
            why = f"none for {missing[0]}" if missing else "some lines name no file, or one twice"
            raise UsageError(f"{path}: the captions do not fit the images: {why}")
        return tuple(named[name] for name in images.names)
    if len(rows) not in (len(images.names), images.found):
        raise UsageError(f"{path} has {len(rows)} captions for {images.found} images: give one line for each, in the order of their names")
    return tuple(caption for _, caption in rows[: len(images.names)])


def _caption(path: Path, number: int, line: str) -> tuple[str | None, str]:
    """The file that a line names, if it does, and its caption."""
    file: Any = None
    caption: Any = line
    if path.suffix == ".jsonl":
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UsageError(f"{path}:{number} is no JSON: write an object with a caption a line") from None
        caption, file = (row.get("caption"), row.get("file")) if isinstance(row, dict) else (row, None)
    if not isinstance(caption, str) or not caption.strip() or not (file is None or isinstance(file, str)):
        raise UsageError(f"{path}:{number} holds no caption: write one line for each image")
    return file, caption


# ---------------------------------------------------------------------- scores


def score_folders(folders: Folders, store: Store, say: Report | None = None, *, device: str = "cpu") -> RunRecord:
    """Take features, score, and keep a record. Raises UsageError where a file turns out to be broken: n is never pretended.

    device: of the published networks; the embedded one runs on the processor.
    """
    torch.set_num_threads(1)
    lacking = {name for name in folders.metrics if name in WEIGHTS_OF and not _has_weights(name, folders.weights)}
    networks = [name for name in folders.metrics if name in WEIGHTS_OF and name not in lacking]
    taking = _Taking(store.folder / FEATURES, len(folders.images), len(folders.reference), say)
    taking.expect(2 + len(networks), 1 + sum(name in FIDS for name in networks))
    extractor = embedded_extractor(folders.images.size)
    ours, theirs = taking.features(extractor, folders.images), taking.features(extractor, folders.reference)
    found = {score.name: score for score in _embedded(folders, extractor, ours, theirs)}
    for name in networks:
        found[name] = _published(name, folders, taking, device)
    found |= {name: not_run(name, len(folders.images), higher_is_better=name not in FIDS) for name in lacking}
    record = _record(folders, [found[name] for name in folders.metrics], set_sha256(ours.sha256), set_sha256(theirs.sha256), device)
    store.add(record)
    return record


class _Taking:
    """Takes features of the folders, each file once for each extractor, and says how far all of it is."""

    def __init__(self, cache: Path, images: int, reference: int, say: Report | None):
        self._cache, self._counts, self._say = cache, (images, reference), say
        self._all, self._before = 1, 0

    def expect(self, of_images: int, of_reference: int) -> None:
        """How often each folder will be read."""
        self._all = of_images * self._counts[0] + of_reference * self._counts[1]

    def features(self, extractor: Extractor, folder: ImageFolder) -> FolderFeatures:
        def told(done: int) -> None:
            if self._say is not None:
                self._say(min((self._before + done) / self._all, 0.99), f"{extractor.name}, {folder.folder.name}")

        told(0)
        found = features_of_folder(folder, extractor, self._cache, progress=told)
        folder.require()
        self._before += len(folder)
        return found


class _ClipImages:
    """The image half of a CLIP network as an extractor."""

    def __init__(self, clip: ClipScore):
        self.name, self.weights_sha256, self.preprocessing = clip.name, clip.weights_sha256, clip.preprocessing
        self._clip = clip
        self.width = int(clip.image_features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape[1])

    def __call__(self, images: Tensor) -> Tensor:
        return self._clip.image_features(images)


def _embedded(folders: Folders, extractor: Extractor, ours: FolderFeatures, theirs: FolderFeatures) -> list[Score]:
    """Images of one caption belong together."""
    captions = np.unique(np.asarray(folders.captions), return_inverse=True)[1].tolist() if folders.captions else None
    return image_scores(
        seen_features(ours.features, captions), Reference(as_float64(theirs.features), set_sha256(theirs.sha256)), extractor,
        image_steps=folders.images.reading, prompts_sha256=folders.captions_sha256,
    )  # fmt: skip


def _published(name: str, folders: Folders, taking: _Taking, device: str) -> Score:
    if name in FIDS:
        inception = Inception(FIDS[name], folders.weights, device=device)
        ours, theirs = taking.features(inception, folders.images), taking.features(inception, folders.reference)
        score = fid_score(inception, ours.features, theirs.features, reference_sha256=set_sha256(theirs.sha256))
    else:
        made: Any = ClipScore if name in CLIP_SCORES else HpsScore
        clip = made({**CLIP_SCORES, **HPS_SCORES}[name], folders.weights, device=device)
        ours = taking.features(_ClipImages(clip), folders.images)
        cosines = np.einsum("nd,nd->n", as_float64(ours.features), as_float64(clip.text_features(folders.captions)))
        score = clip.score(cosines, folders.captions, prompts_sha256=folders.captions_sha256)
    what = {**score.identity, "preprocessing": [*folders.images.reading, *score.identity["preprocessing"]]}
    return dataclasses.replace(score, identity=what)


def _has_weights(name: str, folder: Path | None) -> bool:
    try:
        find(WEIGHTS_OF[name], folder)
    except WeightsMissing:
        return False
    return True


def _record(folders: Folders, scores: Sequence[Score], ours: str, theirs: str, device: str) -> RunRecord:
    """A record that no board shows. Which scores could be taken belongs to its id, so that one made with more weights is another."""
    noted = [dataclasses.replace(score, note="; ".join(part for part in (score.note, folders.note) if part)) for score in scores]
    config = {"captions_sha256": folders.captions_sha256, "reference_sha256": theirs,
              "scores": {score.name: None if score.value is None else score.key for score in scores}}  # fmt: skip
    draft = RunRecord(
        id="", track=TRACK, method="images", method_version=1, label=plain_name(folders.images.folder.resolve().name), config=config,
        budget=None, seed=0, threads=1, dtype="float32", device_class=device.partition(":")[0], steps=[1], trained_for=[],
        data_access="not known", family=RELEASED, status="ok", created=now(), kind=RELEASED, source_sha256=ours, environment=environment(),
        scores={"1": [score.to_json() for score in noted]}, evaluations={"1": 0}, checksums={"images": ours, "reference": theirs},
    )  # fmt: skip
    return dataclasses.replace(draft, id=run_id(**draft.determinants())).scrubbed()
