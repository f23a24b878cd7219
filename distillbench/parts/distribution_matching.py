"""Distribution matching: descend KL(student || teacher), averaged over noise levels, with two denoisers.

DMD (Yin et al. 2023, arXiv 2311.18828, algorithm 2) and what builds on it. At x_t = alpha x + sigma eps the gradient of the KL
divergence is proportional to fake(x_t, t) - real(x_t, t): posterior means of x under the student's and the teacher's samples.

Variational score distillation (VSD, ProlificDreamer, arXiv 2305.16213) is the same with the means of the noise: w_t (eps_real - eps_fake),
where eps_real - eps_fake = alpha / sigma (fake - real). Score distillation sampling (SDS, DreamFusion, arXiv 2209.14988) has the drawn
noise in the place of eps_fake, that is x in the place of the fake score's mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..conditions import Conditions
from ..diffusion.base import Schedule, broadcast
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedules import match_time
from ..diffusion.solvers import jump
from ..errors import unknown

WEIGHTINGS = ("inv_l1", "sigma/alpha", "sigma^3/alpha", "alpha^2/sigma^2", "none")
NOISE_WEIGHTINGS = ("sigma^2", "1")


def mean_per_sample(x: Tensor) -> Tensor:
    """The mean over all axes but the batch, kept as axes of length 1: (n, 1, ..., 1)."""
    return x.mean(dim=tuple(range(1, x.dim())), keepdim=True)


def matching_gradient(x: Tensor, real: Tensor, fake: Tensor, path: Schedule, t: Tensor, *, weighting: str = "inv_l1",
                      floor: float = 1e-3) -> Tensor:  # fmt: skip
    """The direction g (n, *shape) along which each sample x is to fall: (fake - real) times a weight.

    real, fake: x0 predictions at x_t.  t: (n,), read by the two fixed weights only.
    inv_l1: 1 / mean |x - real|, one number a sample, at least `floor` in the denominator (the paper's).
    sigma/alpha, sigma^3/alpha: w_t of DreamFusion and ProlificDreamer in w_t alpha (s_fake - s_real), s the scores.
    alpha^2/sigma^2: that with w_t = 1, the gradient of KL(student_t || teacher_t) itself.  none: 1.
    """
    gap = fake - real
    if weighting == "inv_l1":
        return gap / mean_per_sample((x - real).abs()).clamp_min(floor)
    if weighting == "sigma/alpha":
        return gap * broadcast(path.alpha(t) / path.sigma(t), x)
    if weighting == "sigma^3/alpha":
        return gap * broadcast(path.alpha(t) * path.sigma(t), x)
    if weighting == "alpha^2/sigma^2":
        return gap * broadcast((path.alpha(t) / path.sigma(t)) ** 2, x)
    if weighting == "none":
        return gap
    raise unknown("weighting", weighting, WEIGHTINGS)


def noise_gradient(real: Tensor, fake: Tensor, path: Schedule, t: Tensor, *, weighting: str = "sigma^2") -> Tensor:
    """The direction (n, *shape) of VSD along which each sample is to fall: w_t (real - fake), with 0 for what is not a number.

    real, fake: eps predictions at x_t.  t: (n,).  sigma^2: w_t = sigma_t^2 (SwiftBrush).  1: no weight. In exact arithmetic these are
    `matching_gradient` with sigma^3/alpha and sigma/alpha.
    """
    if weighting not in NOISE_WEIGHTINGS:
        raise unknown("weighting", weighting, NOISE_WEIGHTINGS)
    gap = real - fake
    return torch.nan_to_num(broadcast(path.sigma(t) ** 2, gap) * gap if weighting == "sigma^2" else gap)


def surrogate(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient at x is `gradient` / x.numel(). Its value, half the mean square of `gradient`, is no divergence."""
    return 0.5 * (x - (x - gradient).detach()).square().mean()


def matching_loss(x: Tensor, t: Tensor, noise: Tensor, conditions: Conditions, teacher: Denoiser, fake: Denoiser | None, *,
                  guidance_scale: float = 1.0, fake_guidance_scale: float = 1.0, weighting: str = "inv_l1",
                  floor: float = 1e-3) -> Tensor:  # fmt: skip
    """L_DM for samples x (n, *shape) at times t (n,): no gradient reaches or passes through either score.

    The teacher is guided; the fake score is not, unless it is given a scale of its own (DMD: not, SwiftBrush: the teacher's).
    weighting: of `matching_gradient`, on means of x, or of `noise_gradient`, on means of the noise.  fake: None is SDS.
    """
    with torch.no_grad():
        x_t = jump(teacher.path, x, noise, t)
        real = teacher.predict(x_t, t, conditions, guidance_scale=guidance_scale)
        own = None if fake is None else fake.predict(x_t, t, conditions, guidance_scale=fake_guidance_scale)
        if weighting in NOISE_WEIGHTINGS:
            gradient = noise_gradient(real.eps, noise if own is None else own.eps, teacher.path, t, weighting=weighting)
        else:
            mean = x if own is None else own.x0
            gradient = matching_gradient(x, real.x0, mean, teacher.path, t, weighting=weighting, floor=floor)
    return surrogate(x, gradient)


def weighted_noise_loss(fake: Denoiser, x: Tensor, t: Tensor, noise: Tensor, conditions: Conditions) -> Tensor:
    """Denoising score matching as SwiftBrush trains its fake score: mean of alpha_t^2 (eps - noise)^2 on the denoiser's path.

    x (n, *shape) is held fixed.
    """
    x_t = jump(fake.path, x.detach(), noise, t)
    return (broadcast(fake.path.alpha(t) ** 2, x) * (fake.eps(x_t, t, conditions) - noise).square()).mean()


def fake_score_loss(fake: Denoiser, x: Tensor, t: Tensor, noise: Tensor, conditions: Conditions, *, guidance_scale: float = 1.0) -> Tensor:
    """Denoising score matching on samples x (n, *shape), which are held fixed, in what the network itself predicts (guided).

    velocity and eps networks: plain mean squared error.  score networks: that of eps = -sigma score.
    x0 networks: weighted by alpha^2 / sigma^2 + 1 / 0.5^2 (Karras et al. 2022, sigma_data 0.5).
    """
    own = fake.on(fake.schedule)
    t = match_time(fake.path, t, own.path)
    x = x.detach()
    prediction = own.predict(jump(own.path, x, noise, t), t, conditions, guidance_scale=guidance_scale)
    if fake.prediction == "velocity":
        target = broadcast(own.path.d_alpha(t), x) * x + broadcast(own.path.d_sigma(t), x) * noise
        return (prediction.velocity - target).square().mean()
    if fake.prediction == "x0":
        weight = (own.path.alpha(t) / own.path.sigma(t)) ** 2 + 4.0
        return (broadcast(weight, x) * (prediction.x0 - x).square()).mean()
    return (prediction.eps - noise).square().mean()
