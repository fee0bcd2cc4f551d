"""Sampler for k-diffusion and ComfyUI that runs any linear SDE."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from cldsde.linear.checks import as_integer, check_callable, shaped
from cldsde.linear.interpolants import RectifiedFlow, falling
from cldsde.linear.processes import CLD, HOLD, PSLD, VESDE, VPSDE, SubVPSDE
from cldsde.linear.random import check_generator
from cldsde.linear.sde import LinearSDE
from cldsde.pretrained.descriptions import process_of, solver_of
from cldsde.pretrained.stepping import PathSteps, check_steppable, recommended_steps, streams_of
from cldsde.progress import progress_bar
from cldsde.renamed import warn_of_old
from cldsde.score import NoisePath
from cldsde.solvers import SamplerSettings
from cldsde.solvers.base import Solver
from cldsde.solvers.noise import CheckedNoise, FreshNoise, NoiseSource, SampleNoise

# Levels are often rounded to float32.
_ROUNDING = 1e-6
_SAME = 1e-4  # in κ


@torch.no_grad()
def sample_k_diffusion(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    *,
    process: LinearSDE | str | None = None,
    solver: Solver | str | None = None,
    path: NoisePath | None = None,
    settings: SamplerSettings | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    noise: NoiseSource | None = None,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    r"""Sample with any linear SDE, with the arguments of the samplers of k-diffusion and ComfyUI.

    The model sees x = x_0 + σ n. Velocities and other components of the process stay inside. Each
    level but the last is one evaluation of the model. The result ``(B, *D)`` has the dtype of x: it
    is the last evaluation if ``sigmas`` ends in 0, and x of the last level otherwise. See the page
    "Sample in ComfyUI or k-diffusion" for examples, levels, and the samplers of k-diffusion.

    Parameters
    ----------
    model
        Denoiser model(x, sigma, \*\*extra_args) of ``(B, *D)`` and levels ``(B,)`` that returns an
        estimate of x_0.
    x
        Noisy data ``(B, *D)`` of level ``sigmas[0]``.
    sigmas
        Decreasing levels ``(n + 1,)``, which may end above 0. With one level, x is returned.
    extra_args
        Keyword arguments of the model.
    callback
        Called after each evaluation with a dictionary of ``'x'``, ``'i'``, ``'sigma'``,
        ``'sigma_hat'`` (equal to ``'sigma'``) and ``'denoised'``. It may change ``'x'`` and
        ``'denoised'`` in place.
    disable
        Whether to hide the progress bar. None: show it if stderr is a terminal.
    process
        The process, or the name of its class. None: `cldsde.CLD`.
    solver
        A solver that evaluates the score once per step, at its start, or its name. None: the
        recommended one for the process and number of steps; a part of a sampling counts as many.
    path
        Signal α and noise σ of x = α(t) x_0 + σ(t) n, if ``sigmas`` are times t of this path. None:
        ``NoisePath.linear()`` for flow models of ComfyUI (``CONST``), x = x_0 + σ n for others.
    settings
        Settings in place of ``solver``, for example from `cldsde.solvers.recommend`. ``sigmas``
        must then be ``settings.sigmas``, or the levels from one of these to the last.
    seed, generator, noise
        One source of the noise: a seed, from which each sample has a random stream of its own; a
        generator; or a noise source. None: random streams that depend on each sample's x alone.
    noise_sampler
        k-diffusion's source of noise, noise_sampler(sigma, next_sigma), in place of these. For
        processes of one component.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, the levels do not decrease, the process does not reach
        them, or the solver does not apply. The model has not been evaluated then.
    """
    _check_arguments(model, x, callback)
    arguments = {} if extra_args is None else dict(extra_args)
    sde = CLD() if process is None else process_of(process)
    grid_solver = None if solver is None else check_steppable(solver_of(solver))
    path = _path_of(model) if path is None else path
    levels = _checked_levels(sigmas)
    source = _noise_source(_given_noise(seed, generator, noise, len(x)), noise_sampler, x, sde)
    if len(levels) < 2:
        return x
    steps = _steps(sde, grid_solver, levels, path, settings)
    given = torch.as_tensor(sigmas)
    shown = sys.stderr.isatty() if disable is None else not disable
    for i in progress_bar(range(len(levels) - 1), shown=shown, desc="sampling"):
        sigma = given[i]
        denoised = _denoised(model, x, sigma, arguments)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        if isinstance(source, _SamplerNoise):
            source.levels = sigma, given[i + 1]
        x = steps.step(i, x, denoised, CheckedNoise(source))
    return x


def _check_arguments(model: object, x: object, callback: object) -> None:
    """Raise TypeError unless model and callback can be called, and x is a batch of numbers."""
    check_callable(model, "model", "a denoiser model(x, sigma)")
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 and len(x) > 0):
        kind = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor (B, *D); got {kind}")
    if callback is not None:
        check_callable(callback, "callback", "a function of a dictionary")


def _denoised(
    model: Callable[..., Tensor], x: Tensor, sigma: Tensor, arguments: dict[str, Any]
) -> Tensor:
    """The model's estimate of x_0; raise ValueError if it does not have the shape of x."""
    denoised = model(x, sigma * x.new_ones(len(x)), **arguments)
    if not isinstance(denoised, Tensor) or denoised.shape != x.shape:
        msg = f"model must return a tensor like x, {tuple(x.shape)}; got {shaped(denoised)}"
        raise ValueError(msg)
    return denoised


class _SamplerNoise(NoiseSource):
    """Normals of k-diffusion's noise_sampler(sigma, next_sigma)."""

    def __init__(self, sampler: Callable[[Tensor, Tensor], Tensor], levels: Any = None) -> None:
        self.sampler, self.levels = sampler, levels

    def normal(self, z: Tensor, rows: int) -> Tensor:
        """Return the sampler's normals of the present step, ``(B, 1, *D)``."""
        drawn: Tensor = self.sampler(*self.levels)
        return drawn.unsqueeze(1).to(z)


def _given_noise(seed: object, generator: object, noise: object, count: int) -> object:
    """The noise source that the arguments name, or None."""
    if isinstance(noise, torch.Generator):
        warn_of_old("noise=generator", "generator", stacklevel=5)
        generator, noise = noise, None
    elif isinstance(noise, Integral) and not isinstance(noise, bool):
        warn_of_old("noise=seed", "seed", stacklevel=5)
        seed, noise = noise, None
    given = {"seed": seed, "generator": generator, "noise": noise}
    if len(names := [name for name, x in given.items() if x is not None]) > 1:
        raise ValueError(f"{' and '.join(names)} are alternatives; got both")
    if generator is not None:
        check_generator(generator, several=False)
        return FreshNoise(generator)  # type: ignore[arg-type]
    if seed is not None:
        return SampleNoise(range(count), key=as_integer(seed, 0, "seed"))
    return noise


def _noise_source(
    noise: object, sampler: Callable[[Tensor, Tensor], Tensor] | None, x: Tensor, sde: LinearSDE
) -> NoiseSource:
    if sampler is not None:
        check_callable(sampler, "noise_sampler", "a function noise_sampler(sigma, next_sigma)")
        if noise is not None:
            raise ValueError("noise and noise_sampler are alternatives; got both")
        if sde.components > 1:
            raise ValueError(
                f"noise_sampler must be None for {sde!r}: it gives one normal number per entry of "
                f"x and step, and the process has {sde.components} components, which also need "
                "noise at the start. Pass seed, generator or noise"
            )
        return _SamplerNoise(sampler)
    if noise is None:
        return streams_of(x)
    if not isinstance(noise, NoiseSource):
        raise TypeError(f"noise must be a NoiseSource; got {noise!r}")
    # A source with one stream per sample must fit the batch.
    noise.check(x.unsqueeze(1).expand(-1, sde.components, *(-1,) * (x.ndim - 1)))
    return noise


def _checked_levels(sigmas: Tensor | Sequence[float]) -> Tensor:
    """Levels in float64 on the CPU; raise unless they decrease to 0 or more."""
    try:
        levels = torch.as_tensor(sigmas).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"sigmas must be a tensor or a sequence of numbers; got {sigmas!r}"
        raise TypeError(msg) from error
    if levels.ndim != 1:
        msg = f"sigmas must have one axis, (n + 1,); got the shape {tuple(levels.shape)}"
        raise ValueError(msg)
    if not bool((levels.isfinite() & (levels >= 0)).all()):
        raise ValueError(f"sigmas must be finite and not negative; got {levels.tolist()}")
    wrong = (levels.diff() >= 0).nonzero().flatten().tolist()
    if wrong:
        i = wrong[0]
        raise ValueError(
            "sigmas must decrease, from the noise to the data; got "
            f"{float(levels[i]):.6g} and then {float(levels[i + 1]):.6g}"
        )
    return levels


def _steps(
    sde: LinearSDE,
    solver: Solver | None,
    levels: Tensor,
    path: NoisePath | None,
    settings: SamplerSettings | None,
) -> PathSteps:
    """Steps of the process between the levels, which it must reach."""
    signal, noise = _scales(levels, path)
    kappa = signal.log() - noise.log()
    _check_reached(sde, kappa)
    if settings is not None:
        settings.times(sde)  # raises if they are for another process
        if solver is not None:
            raise ValueError("solver must be None with settings, which have it")
        wanted = -settings.sigmas.log()[-len(kappa) :]
        same = len(wanted) == len(kappa) and torch.allclose(kappa, wanted, rtol=0, atol=_SAME)
        if not same:
            raise ValueError(
                f"sigmas must be settings.sigmas, or a last part of them, "
                f"{settings.sigmas.tolist()}; got {levels.tolist()}"
            )
        # Levels that were rounded to float32 would start or end beyond the process.
        return PathSteps(sde, settings.solver, wanted, signal, noise)
    return recommended_steps(sde, solver, kappa, signal, noise)


def _scales(levels: Tensor, path: NoisePath | None) -> tuple[Tensor, Tensor]:
    """α and σ of x = α x_0 + σ n at the levels."""
    if path is None:
        return torch.ones_like(levels), levels
    if not isinstance(path, NoisePath):
        raise TypeError(f"path must be a NoisePath, such as NoisePath.linear(); got {path!r}")
    start, end = path.interval
    if float(levels[0]) > end * (1 + _ROUNDING) or 0 < float(levels[-1]) < start * (1 - _ROUNDING):
        raise ValueError(
            f"sigmas must be times of the path, {start:g} to {end:g}; got {float(levels[0]):g} to "
            f"{float(levels[-1]):g}"
        )
    times = levels.clamp(start, end)
    signal, noise = path.signal(times), path.noise(times)
    if float(levels[-1]) == 0:  # the data, whether or not the path has such a time
        signal, noise = signal.clone(), noise.clone()
        signal[-1], noise[-1] = 1.0, 0.0
    return signal, noise


def _check_reached(sde: LinearSDE, kappa: Tensor) -> None:
    """Raise ValueError if a process has less noise than the first level, unless it is all noise."""
    wanted, reach = float(kappa[0]), float(sde.kappa(1.0))
    if wanted == -math.inf or wanted >= reach - _ROUNDING:
        return
    sigma = math.exp(-wanted)
    exploding = VESDE(sigma_max=max(50.0, math.ceil(sigma)))
    known = (CLD(), PSLD(), HOLD(), VPSDE(), SubVPSDE(), RectifiedFlow(), exploding)
    found = [repr(other) for other in known if float(other.kappa(1.0)) <= wanted]
    raise ValueError(
        f"sigmas must start at σ = {math.exp(-reach):.4g} or less for {sde!r}; got {sigma:.4g}. "
        f"These processes reach it: {', '.join(found)}"
    )


def _path_of(model: Any) -> NoisePath | None:
    """Linear path if a model of ComfyUI says that it is a flow model; otherwise None.

    A sampler's model there wraps others as ``inner_model``. The last has ``model_sampling``, whose
    class derives from ``CONST`` for x = (1 − t) x_0 + t s n with s = ``noise_scale``.
    """
    while (sampling := getattr(model, "model_sampling", None)) is None:
        model = getattr(model, "inner_model", None)
        if model is None:
            return None
    if all(kind.__name__ != "CONST" for kind in type(sampling).__mro__):
        return None
    scale = float(getattr(sampling, "noise_scale", 1.0))
    return NoisePath.linear() if scale == 1 else NoisePath(falling, partial(torch.mul, scale))
