"""The protocol of scores: every wrapper passes on every ability, however deep it is nested."""

import copy
from collections import OrderedDict

import pytest
import torch

from cldsde import (
    CLD,
    VPSDE,
    DenoiserScore,
    GuidedScore,
    Observation,
    RectifiedFlow,
    ReverseProcess,
)
from cldsde.linear.log_snr import times_of_log_snr
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

    def __init__(self, sde, *, predicts_data=True, depends_on_place=False):
        super().__init__()
        self.sde, self.noise_levels = sde, (0.02, 50.0)
        self.predicts_data, self.depends_on_place = predicts_data, depends_on_place
        self.shared_conditions = ("ids",)
        self.calls, self.times = 0, []
        self.shift = torch.linspace(-1, 1, BATCH, dtype=torch.float64).reshape(BATCH, 1)

    def note(self, z, t, planned, weight):
        self.calls += 3 * len(z) // BATCH  # a score whose evaluation costs three
        self.times.append(score_times(t, z, planned))
        scale = weight.reshape(-1, 1) if weight.ndim else weight
        return (scale * self.shift).to(z)

    def forward(self, z, t, *, planned=None, weight=ONE):
        shift = self.note(z, t, planned, weight).unsqueeze(1)
        return shift - z[:, list(self.sde.driven)]

    def data_prediction(self, z, t, *, planned=None, weight=ONE):
        return self.note(z, t, planned, weight) + 0.5 * z[:, 0]

    def check_times(self, t):
        if bool((t > 0.9).any()):
            raise ValueError("Able stops at 0.9")

    def evaluations(self, t):
        return torch.full_like(t, 3, dtype=torch.int64)

    def part(self, samples, shape):
        other = copy.copy(self)
        other.shift = self.shift.expand(shape[0], 1)[samples]
        return other

    def _apply(self, fn, recurse=True):
        self.shift = fn(self.shift)
        return super()._apply(fn, recurse)


def rows(count=BATCH):
    return torch.linspace(0.5, 1.5, count, dtype=torch.float64)


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
    **{f"{name}, once": make for name, make in WRAPPERS.items()},
    **{
        f"{name}, twice": (lambda score, make=make: make(make(score)))
        for name, make in WRAPPERS.items()
    },
    "guided, of conditional, of another process": lambda score: WRAPPERS["guided"](
        Plain(WRAPPERS["another process"](score))
    ),
}
# A posterior score cannot be differentiated, so nothing that takes gradients may be around it.
del NESTED["posterior, twice"], NESTED["posterior, one gradient, twice"]
NESTED["posterior, twice"] = lambda score: Plain(observed(ConditionalScore(score, weight=rows())))

every_wrapper = pytest.mark.parametrize("name", NESTED)
EXACT = {"rtol": rounding(1e3), "atol": rounding(1e3)}


def made(name, **options):
    leaf = Able(VPSDE(), **options)
    return leaf, NESTED[name](leaf)


def state(score, n=BATCH):
    shape = (n, score.sde.components, *SHAPE[1:])
    return torch.randn(shape, generator=generator(3), dtype=torch.float64)


def planned(score, t=TIMES):
    return KnownTimes(t).arguments(state(score))


def methods(score):
    found = [score]
    return [*found, score.data_prediction] if score.predicts_data else found


@every_wrapper
@pytest.mark.parametrize("value", [True, False])
def test_process_levels_and_flags_are_passed_on(name, value):
    leaf, score = made(name, predicts_data=value, depends_on_place=value)
    assert score.sde.components in (1, 2)
    assert score.depends_on_place is value
    assert set(score.shared_conditions) == {"ids"}
    if "another process" in name:  # a denoiser knows its own levels and predicts data
        assert score.predicts_data
        return
    assert (score.sde, score.noise_levels) == (leaf.sde, leaf.noise_levels)
    assert score.predicts_data is value


@every_wrapper
def test_times_are_checked_by_the_innermost_score(name):
    _, score = made(name)
    if "another process" in name:
        with pytest.raises(ValueError, match="noise level"):
            score.check_times(torch.tensor([0.5, 1.0, 1e-12], dtype=torch.float64))
        return
    score.check_times(TIMES)
    with pytest.raises(ValueError, match=r"Able stops at 0\.9"):
        score.check_times(torch.tensor([0.5, 0.95], dtype=torch.float64))


@pytest.mark.one_in(3)
@every_wrapper
@pytest.mark.parametrize("place", [True, False])
@pytest.mark.parametrize("times", ["shared", "per sample"])
def test_evaluations_are_those_that_happen(name, times, place):
    leaf, score = made(name, depends_on_place=place)
    z = state(score)
    t = TIMES if times == "shared" else torch.stack([TIMES.roll(i) for i in range(BATCH)], 1)
    expected = score.evaluations(t)
    for i, single in enumerate(t):
        for method in methods(score):
            leaf.calls = 0
            method(z, single if single.ndim else single.expand(BATCH))
            wanted = expected[i]
            assert leaf.calls == int(wanted.max())
            assert bool((wanted == wanted.max()).all())


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
        score(z, at.argument)
        exact = TIMES[i : i + 1]
        rounded = exact.to(torch.float32).double()
        if score.sde is not leaf.sde:
            # The innermost process has the same level at another time; twice is there and back.
            exact, rounded = (
                times_of_log_snr(leaf.sde, score.sde.log_snr(t), eps=1e-5) for t in (exact, rounded)
            )
        planned, read = float(leaf.times[0].max()), float(leaf.times[-1].max())
        # The inverse of κ is accurate to the rounding of log t.
        assert planned == pytest.approx(float(exact), rel=rounding(64), abs=0)
        assert read != pytest.approx(float(exact), rel=rounding(64), abs=0)
        assert read == pytest.approx(float(rounded), rel=rounding(4, dtype=torch.float32), abs=0)


@every_wrapper
def test_a_planned_time_counts_for_its_own_tensor_only(name):
    _, score = made(name)
    z, at = state(score), planned(score)[0]
    other = torch.full((BATCH,), 0.4, dtype=torch.float64)
    torch.testing.assert_close(score(z, other, planned=at), score(z, other), rtol=0, atol=0)


@every_wrapper
def test_a_device_is_passed_on_to_everything(name):
    _, score = made(name)

    def tensors(module):
        for child in module.modules():
            values = [*vars(child).values(), *getattr(child, "conditions", {}).values()]
            values.append(getattr(getattr(child, "observation", None), "y", None))
            yield from (x for x in values if isinstance(x, torch.Tensor))

    before = list(tensors(score))
    assert before
    assert all(x.device.type == "cpu" for x in before)
    assert all(x.device.type == "meta" for x in tensors(score.to("meta")))


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
        return ConditionalScore(base, embedding=embedding, added=added)

    base = ConditionalScore(network)
    guided = GuidedScore(given(1.0), given(-1.0), 2.0)
    z = torch.randn(BATCH, 1, 3, generator=generator(), dtype=torch.float64)
    whole = guided(z, 0.5)
    assert len(seen) == 1  # one call of twice the batch
    assert seen[0] == ((2 * BATCH, 4), (2 * BATCH,), [(2 * BATCH, 2)])
    part = guided.part(slice(1, 4), SHAPE)(z[1:4], 0.5)
    torch.testing.assert_close(part, whole[1:4], **EXACT)
    moved = guided.to("meta").conditional.conditions
    assert moved["embedding"].device.type == moved["added"]["ids"].device.type == "meta"
    assert moved["added"]["residuals"][0].device.type == "meta"
    added = ConditionalScore(base, added={"ids": rows()})
    with pytest.raises(
        ValueError, match=r"condition added\['ids'\] .* one row per sample, 7; got 6"
    ):
        added.part(slice(0, 2), (7, 3))


def test_conditions_of_nested_scores_are_put_together():
    inner = ConditionalScore(lambda z, t, a, b: a - b * z, a=2.0, b=5.0)
    z = torch.ones(2, 1, 1)
    assert ConditionalScore(inner, b=1.0)(z, 0.5).flatten().tolist() == [1.0, 1.0]


def test_a_score_without_a_data_prediction_says_so():
    with pytest.raises(ValueError, match="must have a data prediction of its own; got <function"):
        Plain(lambda z, t: -z).data_prediction(torch.zeros(2, 1, 3), 0.5)


def test_a_posterior_cannot_start_where_nothing_of_the_data_is_left():
    flow = RectifiedFlow()
    score = PosteriorScore(lambda z, t: -z, Observation.mask(SEEN, torch.zeros(3), 0.3), sde=flow)
    with pytest.raises(ValueError, match=r"earlier than 1 for a PosteriorScore"):
        score.check_times(torch.tensor([0.5, 1.0], dtype=torch.float64))


# Compilation takes a second each, and treats all wrappers alike.
@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["plain, twice", "guided, once", "another process, once"])
def test_a_compiled_score_keeps_its_abilities(name):
    _, score = made(name)
    compiled = ReverseProcess(score.sde, torch.compile(score, backend="eager")).score
    for ability in ("sde", "noise_levels", "predicts_data", "depends_on_place"):
        assert getattr(compiled, ability) == getattr(score, ability)
    assert torch.equal(compiled.evaluations(TIMES), score.evaluations(TIMES))
    z, at = state(score), planned(score)[0]
    torch.testing.assert_close(called(compiled, z, at), called(score, z, at), **EXACT)
    part = compiled.part(slice(2, 5), SHAPE)
    torch.testing.assert_close(part(z[2:5], 0.2), score(z, 0.2)[2:5], **EXACT)


@pytest.mark.slow
def test_a_compiled_denoiser_keeps_its_abilities():
    for score in (Able(CLD()), GuidedScore(Able(CLD()), Able(CLD()), 2.0)):
        denoiser = ScoreDenoiser(score, seed=1)
        plain, compiled = (
            DenoiserScore(x, VPSDE()) for x in (denoiser, torch.compile(denoiser, backend="eager"))
        )
        assert (compiled.noise_levels, compiled.depends_on_place) == (plain.noise_levels, True)
        assert torch.equal(compiled.evaluations(TIMES), plain.evaluations(TIMES))
        z = state(plain)
        torch.testing.assert_close(compiled(z, 0.3), plain(z, 0.3), **EXACT)


def test_guidance_around_data_per_sample_calls_both_scores():
    def score(z, t, row, label):
        return row[:, None, None] - label[:, None, None] * z

    base = ConditionalScore(score, row=rows())
    guided = GuidedScore(*(ConditionalScore(base, label=x * ONE) for x in (1, 2)), 3.0)
    z = torch.randn(BATCH, 1, 3, generator=generator(), dtype=torch.float64)
    expected = rows()[:, None, None] - (3 * 1 - 2 * 2) * z
    torch.testing.assert_close(guided(z, 0.5), expected, **EXACT)


def test_a_wrapper_that_changes_the_score_alone_does_not_predict_the_data():
    class Halved(ScoreWrapper):
        def forward(self, z, t, **options):
            return 0.5 * super().forward(z, t, **options)

    leaf = Able(RectifiedFlow())
    assert Plain(leaf).predicts_data
    assert not Halved(leaf).predicts_data
    assert not GuidedScore(Halved(leaf), leaf, 2.0).predicts_data


def test_the_levels_and_checks_of_a_score_hold_in_another_process():
    leaf = Able(CLD())
    score = DenoiserScore(ScoreDenoiser(leaf, fill=False), VPSDE())
    assert score.noise_levels == leaf.noise_levels
    score.check_times(times_of_log_snr(VPSDE(), torch.zeros(1, dtype=torch.float64)))
    # The wrapper's own range allows this level of CLD at 0.8, but the score's does not.
    t = times_of_log_snr(VPSDE(), CLD().log_snr(0.8)).reshape(1)
    wide = DenoiserScore(ScoreDenoiser(leaf, fill=False), VPSDE(), noise_levels=(0.02, 130.0))
    with pytest.raises(ValueError, match=r"sigma must lie in \[0\.02, 50\]"):
        wide.check_times(t)


@pytest.mark.parametrize("name", ["z", "t", "planned"])
def test_names_of_a_score_s_arguments_are_no_conditions(name):
    with pytest.raises(ValueError, match="conditions must have other names than z, t, planned"):
        ConditionalScore(lambda z, t: z, **{name: 1})


class Other(Able):
    """A score whose abilities all differ."""

    def __init__(self, sde):
        super().__init__(sde, predicts_data=False, depends_on_place=True)
        self.noise_levels = (0.01, 40.0)

    def check_times(self, t):
        if bool((t > 0.8).any()):
            raise ValueError("Other stops at 0.8")


@pytest.mark.parametrize("swapped", [False, True])
def test_guidance_has_the_abilities_that_both_scores_have(swapped):
    pair = [Able(VPSDE()), Other(VPSDE())]
    guided = GuidedScore(*(reversed(pair) if swapped else pair), 2.0)
    assert guided.noise_levels == (0.02, 40.0)
    assert guided.depends_on_place
    assert not guided.predicts_data
    with pytest.raises(ValueError, match=r"Other stops at 0\.8"):
        guided.check_times(torch.tensor([0.85], dtype=torch.float64))
    pair[0].noise_levels = (60.0, 70.0)
    with pytest.raises(ValueError, match="that both scores know must be two increasing"):
        GuidedScore(*pair, 2.0)


def test_guidance_of_one_plain_function_is_one_call():
    calls = []

    def score(z, t, label):
        calls.append(len(z))
        return -z * label.reshape(-1, 1, 1)

    pair = (ConditionalScore(score, label=torch.tensor(float(x))) for x in (1, 2))
    GuidedScore(*pair, 3.0)(torch.zeros(4, 1, 2), 0.5)
    assert calls == [8]


def test_containers_of_other_types_are_passed_on_as_they_are():
    given = {"size": torch.Size([2, 3]), "pair": (1, torch.ones(2)), "ordered": OrderedDict(a=1)}
    seen = {}
    ConditionalScore(lambda z, t, **x: seen.update(x) or z, **given)(torch.zeros(2, 1, 1), 0.5)
    assert [type(x) for x in seen.values()] == [torch.Size, tuple, OrderedDict]
