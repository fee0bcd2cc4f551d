"""The protocol of scores: every wrapper passes on every ability, however deep it is nested."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from cldsde import CLD, VPSDE, DenoiserScore, GuidedScore, Observation, ReverseProcess
from cldsde.linear.kappa import times_of_kappa
from cldsde.score import ConditionalScore, PosteriorScore, Score, ScoreDenoiser, ScoreWrapper
from cldsde.score.times import KnownTimes, score_times
from probes import generator
from score.cases import called
from tolerances import rounding

BATCH = 6
SHAPE = (BATCH, 3)
TIMES = torch.tensor([0.15, 0.3, 0.6], dtype=torch.float64)
ONE = torch.tensor(1.0)
SEEN = torch.tensor([True, False, True])


class Able(Score):
    """A score with an unusual value of every ability, which notes its calls."""

    def __init__(
        self, sde, levels=(0.02, 130.0), last=0.9, *, predicts_data=True, depends_on_place=False
    ):
        super().__init__()
        self.sde, self.noise_levels, self.last = sde, levels, last
        self.predicts_data, self.depends_on_place = predicts_data, depends_on_place
        self.shared_conditions = ("ids",)
        self.times = []
        self.shift = torch.linspace(-1, 1, BATCH, dtype=torch.float64).reshape(BATCH, 1)

    def note(self, z, t, planned, weight):
        self.times.append(score_times(t, z, planned))
        scale = weight.reshape(-1, 1) if weight.ndim else weight
        return (scale * self.shift).to(z)

    def forward(self, z, t, *, planned=None, weight=ONE):
        shift = self.note(z, t, planned, weight).unsqueeze(1)
        return shift - z[:, list(self.sde.driven)]

    def data_prediction(self, z, t, *, planned=None, weight=ONE):
        return self.note(z, t, planned, weight) + 0.5 * z[:, 0]

    def check_times(self, t):
        if bool((t > self.last).any()):
            raise ValueError(f"Able stops at {self.last}")

    def evaluations(self, t):
        return torch.full_like(t, 3, dtype=torch.int64)

    def part(self, samples, shape):
        other = copy.copy(self)
        other.shift = self.shift.expand(shape[0], 1)[samples]
        return other

    def _apply(self, fn, recurse=True):
        self.shift = fn(self.shift)
        return super()._apply(fn, recurse)


def rows():
    return torch.linspace(0.5, 1.5, BATCH, dtype=torch.float64)


def observed(score, **options):
    y = torch.randn(BATCH, 2, generator=generator(), dtype=torch.float64)
    mask = Observation.mask(SEEN, torch.zeros(3, dtype=torch.float64), 0.3)
    seen = Observation(mask.forward, y, 0.3, (3,))
    return PosteriorScore(score, seen, **options)


class Plain(ScoreWrapper):
    """A wrapper that changes nothing."""


WRAPPERS = {
    "plain": Plain,
    "conditional": lambda score: ConditionalScore(score, weight=rows()),
    "guided": lambda score: GuidedScore(
        ConditionalScore(score, weight=rows()), ConditionalScore(score, weight=rows() - 1), 2.0
    ),
    "guided in an interval": lambda score: GuidedScore(
        ConditionalScore(score, weight=rows()), Plain(score), 2.0, interval=(0.3, 0.9)
    ),
    "posterior": observed,
    "posterior, one gradient": lambda score: observed(score, method="pigdm"),
    "another process": lambda score: DenoiserScore(
        ScoreDenoiser(score, fill=False), CLD() if score.sde.components == 1 else VPSDE()
    ),
}
NESTED = {
    **WRAPPERS,
    # A posterior score cannot be differentiated, so nothing that takes gradients is around it.
    **{
        f"{name}, twice": (lambda score, make=make: make(make(score)))
        for name, make in WRAPPERS.items()
        if "posterior" not in name
    },
    "posterior, of conditional": lambda score: Plain(observed(WRAPPERS["conditional"](score))),
    "guided, of another process": lambda score: WRAPPERS["guided"](
        Plain(WRAPPERS["another process"](score))
    ),
}
every_wrapper = pytest.mark.parametrize("name", NESTED)
EXACT = {"rtol": rounding(1e3), "atol": rounding(1e3)}


def made(name, **options):
    leaf = Able(VPSDE(), **options)
    return leaf, NESTED[name](leaf)


def state(score):
    shape = (BATCH, score.sde.components, *SHAPE[1:])
    return torch.randn(shape, generator=generator(3), dtype=torch.float64)


def planned(score):
    return KnownTimes(TIMES).arguments(state(score))[0]


def methods(score):
    found = [score]
    return [*found, score.data_prediction] if score.predicts_data else found


@every_wrapper
@pytest.mark.parametrize("value", [True, False])
def test_levels_flags_and_counts_are_passed_on(name, value):
    leaf, score = made(name, predicts_data=value, depends_on_place=value)
    assert score.depends_on_place is value
    assert set(score.shared_conditions) == {"ids"}
    assert score.noise_levels == leaf.noise_levels
    assert not bool((score.evaluations(TIMES) % 3).any())
    # A denoiser predicts data.
    assert score.predicts_data is (value or "another process" in name)


@every_wrapper
def test_times_are_checked_by_the_innermost_score(name):
    leaf, score = made(name)
    score.check_times(TIMES)
    # With another process between them, the times of the same noise level.
    t = times_of_kappa(score.sde, leaf.sde.kappa(0.95)).reshape(1)
    with pytest.raises(ValueError, match=r"Able stops at 0\.9"):
        score.check_times(t)


@every_wrapper
def test_a_part_is_the_same_for_its_samples(name):
    _, score = made(name)
    z, some = state(score), slice(2, 5)
    part = score.part(some, SHAPE)
    for t in (0.2, TIMES.repeat(2)):
        own = t if isinstance(t, float) else t[some]
        for whole, few in zip(methods(score), methods(part), strict=True):
            torch.testing.assert_close(few(z[some], own), whole(z, t)[some], **EXACT)
    torch.testing.assert_close(score(z, 0.2), made(name)[1](z, 0.2), rtol=0, atol=0)


@every_wrapper
def test_a_planned_time_reaches_the_innermost_score_exactly(name):
    """States in single precision round the times of a call, but not the planned ones."""
    leaf, score = made(name)
    z = state(score).to(torch.float32)
    for i, at in enumerate(KnownTimes(TIMES).arguments(z)):
        leaf.times.clear()
        called(score, z, at)
        score(z, at.argument.clone(), planned=at)  # which counts for its own tensor only
        exact = TIMES[i : i + 1]
        rounded = exact.to(torch.float32).double()
        if score.sde is not leaf.sde:
            # The innermost process has the same level at another time; twice is there and back.
            exact, rounded = (
                times_of_kappa(leaf.sde, score.sde.kappa(t), eps=1e-5) for t in (exact, rounded)
            )
        planned, read = float(leaf.times[0].max()), float(leaf.times[-1].max())
        # The inverse of κ is accurate to the rounding of log t.
        assert planned == pytest.approx(float(exact), rel=rounding(64), abs=0)
        assert read != pytest.approx(float(exact), rel=rounding(64), abs=0)
        assert read == pytest.approx(float(rounded), rel=rounding(4, dtype=torch.float32), abs=0)


def test_a_device_is_passed_on_to_an_observation_and_its_operator():
    seen = Observation(nn.Linear(3, 2, bias=False), torch.zeros(2), 0.3)
    moved = PosteriorScore(lambda z, t: -z, seen, sde=VPSDE()).to("meta").observation
    assert moved.y.device.type == moved.forward.weight.device.type == "meta"


def test_nested_conditions_are_split_moved_and_joined():
    """Conditions as SDXL has them: a dictionary in a keyword, and a list of residuals."""
    seen = []

    def network(z, t, embedding, added):
        seen.append((embedding.shape, added["ids"].shape, [x.shape for x in added["residuals"]]))
        scale = embedding.mean(1) + added["ids"] + added["residuals"][0][:, 0]
        return -z * scale.reshape(-1, 1, 1)

    def given(shift):
        added = {"ids": rows() + shift, "residuals": [torch.ones(BATCH, 2, dtype=torch.float64)]}
        embedding = torch.full((BATCH, 4), shift, dtype=torch.float64)
        return ConditionalScore(network, embedding=embedding, added=added)

    guided = GuidedScore(given(1.0), given(-1.0), 2.0)
    z = torch.randn(BATCH, 1, 3, generator=generator(), dtype=torch.float64)
    whole = guided(z, 0.5)
    # One call of twice the batch.
    assert seen == [((2 * BATCH, 4), (2 * BATCH,), [(2 * BATCH, 2)])]
    part = guided.part(slice(1, 4), SHAPE)(z[1:4], 0.5)
    torch.testing.assert_close(part, whole[1:4], **EXACT)
    moved = guided.to("meta").conditional.conditions
    assert moved["embedding"].device.type == moved["added"]["ids"].device.type == "meta"
    assert moved["added"]["residuals"][0].device.type == "meta"
    with pytest.raises(ValueError, match=r"added\['ids'\] .* one row per sample, 7; got 6"):
        ConditionalScore(network, added={"ids": rows()}).part(slice(0, 2), (7, 3))


def test_conditions_of_nested_scores_are_put_together():
    inner = ConditionalScore(lambda z, t, a, b: a - b * z, a=2.0, b=5.0)
    z = torch.ones(2, 1, 1)
    assert ConditionalScore(inner, b=1.0)(z, 0.5).flatten().tolist() == [1.0, 1.0]


# Compilation takes a second each, and treats all wrappers alike.
@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ["plain, twice", "guided", "another process", "denoiser"])
def test_a_compiled_score_keeps_its_abilities(name):
    compiler = partial(torch.compile, backend="eager")
    if name == "denoiser":
        vp, denoiser = VPSDE(), ScoreDenoiser(GuidedScore(Able(CLD()), Able(CLD()), 2.0), seed=1)
        score, compiled = (DenoiserScore(x, vp) for x in (denoiser, compiler(denoiser)))
    else:
        _, score = made(name)
        compiled = ReverseProcess(score.sde, compiler(score)).score
    for ability in ("sde", "noise_levels", "predicts_data", "depends_on_place"):
        assert getattr(compiled, ability) == getattr(score, ability)
    assert torch.equal(compiled.evaluations(TIMES), score.evaluations(TIMES))
    z, at = state(score), planned(score)
    torch.testing.assert_close(called(compiled, z, at), called(score, z, at), **EXACT)
    part, expected = (x.part(slice(2, 5), SHAPE)(z[2:5], 0.2) for x in (compiled, score))
    torch.testing.assert_close(part, expected, **EXACT)


def test_a_wrapper_that_changes_the_score_alone_does_not_predict_the_data():
    class Halved(ScoreWrapper):
        def forward(self, z, t, **options):
            return 0.5 * super().forward(z, t, **options)

    leaf = Able(VPSDE())
    assert Plain(leaf).predicts_data
    assert not Halved(leaf).predicts_data


@pytest.mark.parametrize("swapped", [False, True])
def test_guidance_has_the_abilities_that_both_scores_have(swapped):
    able = Able(VPSDE())
    other = Able(VPSDE(), (0.01, 40.0), 0.8, predicts_data=False, depends_on_place=True)
    pair = (other, able) if swapped else (able, other)
    guided = GuidedScore(*pair, 2.0)
    assert guided.noise_levels == (0.02, 40.0)
    assert guided.depends_on_place
    assert not guided.predicts_data
    with pytest.raises(ValueError, match=r"Able stops at 0\.8"):
        guided.check_times(torch.tensor([0.85], dtype=torch.float64))
    able.noise_levels = (60.0, 70.0)
    with pytest.raises(ValueError, match="that both scores know must be two increasing"):
        GuidedScore(*pair, 2.0)
