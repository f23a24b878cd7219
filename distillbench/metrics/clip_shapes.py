"""The score `clipcos/clip-shapes`: how well pictures fit their captions in the eyes of CLIP-shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import sha256

import numpy as np
from torch import Tensor

from ..errors import UsageError
from ..teachers.clip_shapes import NAME, PREPROCESSING, clip_sha256, cosines
from .score import Score, identity


def clipcos(images: Tensor, captions: Sequence[str], *, seeds: Sequence[int] = (), image_steps: tuple[str, ...] = ()) -> Score:
    """The mean cosine of pictures, uint8 (n, 3, 32, 32), and their captions, raw; its 95 % interval over the different captions drawn.

    Pictures of one caption are drawn together: the interval is that of a ratio of sums over captions, and missing with a single one.
    image_steps: how the pictures became uint8. A caption too long or with a foreign word is a UsageError.
    """
    return clipcos_of(cosines(images, captions), captions, seeds=seeds, image_steps=image_steps)


def clipcos_of(found: Tensor, captions: Sequence[str], *, seeds: Sequence[int] = (), image_steps: tuple[str, ...] = ()) -> Score:
    """The same from cosines (n,) that were taken before."""
    each = found.double().numpy()
    if not len(each):
        raise UsageError(f"clipcos/{NAME} needs at least one picture")
    _, caption = np.unique(np.asarray(captions), return_inverse=True)
    gaps = np.bincount(caption, each - each.mean())  # of each caption, summed over its pictures
    what = identity(
        f"clipcos/{NAME}",
        estimator="mean cosine of picture and caption",
        extractor=NAME,
        weights_sha256=clip_sha256(),
        preprocessing=(*image_steps, *PREPROCESSING),
        dtype="float32",
        n_generated=len(each),
        prompts_sha256=sha256("\n".join(captions).encode()).hexdigest(),
        seeds=seeds,
    )
    score = Score("clipcos", what, float(each.mean()), None, None, len(each), True)
    k = len(gaps)
    return score if k < 2 else score.with_interval(math.sqrt(float((gaps**2).sum()) * k / (k - 1)) / len(each))
