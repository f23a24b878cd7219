"""FID's features at full size, on random weights in the published file formats, against clean-fid's and torch-fidelity's own code."""

from __future__ import annotations

import importlib.util
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distillbench.errors import BadFileError, UsageError
from distillbench.metrics.frechet import frechet_distance
from distillbench.metrics.published.inception import MODES, Inception, TorchmetricsFeatures, fid_score
from distillbench.published_weights import Weights, WeightsMissing
from published_files import entry, fidelity_inception, inception_state, pictures, save_inception_archive, trunk

MISSING = [name for name in ("cleanfid", "torch_fidelity", "torchvision") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
IMAGES = 4


class Case:
    """Files, networks and images that the tests of this module share."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.ported, self.archive = folder / "ported.pth", folder / "inception-2015-12-05.pt"
        torch.save(inception_state(), self.ported)
        self.network = fidelity_inception(self.ported)
        save_inception_archive(self.network, self.archive)
        self.images = pictures(IMAGES, 40, 56)
        (folder / "png").mkdir()
        for i, image in enumerate(self.images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "png" / f"{i}.png")
        self.extractors = {mode: Inception(mode, self.file(mode), entry=self.entry(mode)) for mode in MODES}
        self.features = {mode: extractor(self.images) for mode, extractor in self.extractors.items()}

    def file(self, mode: str) -> Path:
        return self.ported if mode == "legacy_pytorch" else self.archive

    def entry(self, mode: str) -> Weights:
        return entry(self.file(mode))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    case = Case(tmp_path_factory.mktemp("inception"))
    yield case
    for path in (case.ported, case.archive):
        path.unlink()  # pytest keeps the folders of three runs


def clean_fid_network(case: Case, mode: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """clean-fid's own extractor; only where its files come from is changed."""
    import cleanfid.features as features

    if mode == "legacy_pytorch":
        state = torch.load(case.ported, weights_only=True)
        monkeypatch.setattr("cleanfid.inception_pytorch.load_state_dict_from_url", lambda *args, **kwargs: state)
        return features.build_feature_extractor(mode, torch.device("cpu"), use_dataparallel=False)
    return features.InceptionV3W(str(case.folder), download=False, resize_inside=mode == "legacy_tensorflow")


def relative(ours: Tensor, theirs: Any) -> float:
    theirs = torch.as_tensor(np.asarray(theirs))
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("mode", MODES)
def test_features_are_those_of_clean_fid_on_a_folder(case, mode, monkeypatch):
    from cleanfid.fid import get_folder_features

    network = clean_fid_network(case, mode, monkeypatch)
    theirs = get_folder_features(
        str(case.folder / "png"), network, num_workers=0, batch_size=IMAGES, device=torch.device("cpu"), mode=mode, verbose=False
    )
    assert case.features[mode].shape == theirs.shape == (IMAGES, 2048)
    assert case.features[mode].dtype == torch.float32
    assert case.features[mode].std() > 0.01  # the random network is alive
    assert relative(case.features[mode], theirs) < 1e-5


def test_the_ported_network_is_that_of_torch_fidelity(case):
    x = torch.nn.functional.interpolate(case.images.float(), (299, 299), mode="bilinear", align_corners=False)
    with torch.no_grad():
        theirs = trunk(case.network, 2 * (x / 255) - 1).flatten(1)
    assert relative(case.features["legacy_pytorch"], theirs) < 1e-5


def test_the_three_modes_are_three_metrics(case):
    from itertools import combinations

    for first, second in combinations(MODES, 2):
        assert relative(case.features[first], case.features[second]) > 1e-3
    assert {extractor.metric for extractor in case.extractors.values()} == {
        "fid/clean-inception2015@299", "fid/legacy_tensorflow-inception2015@299", "fid/legacy_pytorch-inception2015@299"
    }  # fmt: skip
    keys = {fid_score(extractor, np.eye(4), np.eye(4), reference_sha256="r").key for extractor in case.extractors.values()}
    assert len(keys) == 3


def test_features_do_not_depend_on_the_batch(case):
    alone = torch.cat([case.extractors["clean"](image[None]) for image in case.images[:2]])
    assert relative(alone, case.features["clean"][:2]) < 1e-5


def test_nothing_is_fetched_and_the_packages_stay_as_they_were(case, monkeypatch):
    import warnings

    import cleanfid.inception_pytorch as module

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    before, filters = module.load_state_dict_from_url, list(warnings.filters)
    random = torch.get_rng_state()
    for mode in ("clean", "legacy_pytorch"):
        Inception(mode, case.file(mode), entry=case.entry(mode))
    assert module.load_state_dict_from_url is before
    assert list(warnings.filters) == filters
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("mode", ["clean", "legacy_pytorch"])
def test_files_that_are_not_the_weights_are_one_line(case, mode, tmp_path):
    published = "inception-2015-12-05.pt" if mode == "clean" else "pt_inception-2015-12-05-6726825d.pth"
    with pytest.raises(WeightsMissing, match=f"{published}: the weights .* fetch them: curl -L"):
        Inception(mode, tmp_path)
    with pytest.raises(BadFileError, match="not the weights inception2015"):
        Inception(mode, case.file(mode))  # right format, but not the published file
    foreign = tmp_path / "foreign.pt"
    torch.save({"conv.weight": torch.zeros(3)}, foreign)
    with pytest.raises(BadFileError, match=r"foreign.pt: (not the TorchScript archive|weights that do not fit)") as caught:
        Inception(mode, foreign, entry=entry(foreign))
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_mode_and_images_of_another_type_are_refused(case):
    with pytest.raises(UsageError, match="did you mean clean"):
        Inception("clear")
    with pytest.raises(UsageError, match="uint8"):
        case.extractors["clean"](case.images.float())


class Means:
    """The mean colours of four quadrants: an extractor small enough for exact statistics."""

    name, width, weights_sha256, preprocessing = "means", 12, None, ("means of 4 fields",)

    def __call__(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def test_the_score_is_our_distance_with_its_identity():
    generated, reference = Means()(pictures(60, 16, 16)), Means()(pictures(50, 16, 16, seed=1))
    score = fid_score(Means(), generated, reference, reference_sha256="abc", seeds=range(60), resamples=8)
    assert score.value == frechet_distance(generated, reference)
    assert score.low is not None
    assert score.high is not None
    assert score.low < score.value < score.high
    assert (score.name, score.n, score.higher_is_better) == ("fid/means", 60, False)
    assert score.identity["reference_sha256"] == "abc"
    assert score.identity["seeds"] == "0..59"
    assert fid_score(Means(), generated, reference, reference_sha256="other", seeds=range(60)).key != score.key


def test_the_adapter_gives_torchmetrics_the_same_distance():
    torchmetrics = pytest.importorskip("torchmetrics")
    generated, reference = pictures(60, 16, 16), pictures(50, 16, 16, seed=1)
    metric = torchmetrics.image.fid.FrechetInceptionDistance(feature=TorchmetricsFeatures(Means()))
    for images, real in ((reference, True), (generated[:25], False), (generated[25:], False)):
        metric.update(images, real=real)
    assert float(metric.compute()) == pytest.approx(frechet_distance(Means()(generated), Means()(reference)), rel=1e-5)
