"""The aleatoric rival behind several answers in a row ("zigzag"), against its closed form."""

from dataclasses import replace

import pytest
import torch
from hand import FLOW, LINEAR, Hand, curved, model_of, start_of

from bayesdiff.checks import UserError
from bayesdiff.solvers import DDIM, Euler, Field, SampleNoise
from bayesdiff.uncertainty.scores.aleatoric import aleatoric, answer_spread


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize(("path", "prediction"), [(LINEAR, "noise"), (FLOW, "velocity")])
@torch.no_grad()
def test_the_spread_of_a_linear_network_has_a_closed_form(path, prediction, rounds):
    """x~_j = rho x~_(j-1) + sigma z_j, so the last answer is normal."""
    kap, x, t, draws = 0.7, 1.6, 0.4, 200_000
    c = path.coefficients(torch.tensor(t, dtype=torch.float64))
    alpha, sigma = float(c.alpha), float(c.sigma)
    # What is left of a state without its predicted noise: alpha x_1hat = rho x.
    rho = 1 - sigma * kap if prediction == "noise" else alpha * (1 + (1 - t) * kap)
    model = model_of(Hand(lambda x, t, y: kap * x, [[1.0]]), path, prediction)
    state = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
    noise = random(rounds, draws, 1, 1, 1, 1)
    centred, variance = answer_spread(Field(model, None, 1), state, t, noise)
    spread = kap**2 * sigma**2 * sum(rho ** (2 * j) for j in range(rounds))
    assert float(variance) == pytest.approx(spread, rel=0.02)
    assert float(centred) == pytest.approx(spread + (kap * x * (rho**rounds - 1)) ** 2, rel=0.02)
    # And draw for draw.
    states = torch.full((draws,), x, dtype=torch.float64)
    for fresh in noise.flatten(1):
        states = rho * states + sigma * fresh
    assert float(variance) == pytest.approx(float((kap * states).var()), rel=1e-9)
    assert float(centred) == pytest.approx(float((kap * (states - x)).square().mean()), rel=1e-9)


def slow_answer(net, prediction, x, t, noises):
    """The last answer of one draw, the data predicted anew before each noise."""
    c = (LINEAR if prediction == "noise" else FLOW).coefficients(
        torch.tensor(t, dtype=torch.float64)
    )
    alpha, sigma = float(c.alpha), float(c.sigma)

    def ask(state):
        answer = net.head(net.features(state, torch.full((len(state),), t)))
        if prediction == "noise":
            return answer, (state - sigma * answer) / alpha
        return answer, state + (1 - t) * answer

    answer, data = ask(x)
    for z in noises:
        answer, data = ask(alpha * data + sigma * z)
    return answer


@pytest.mark.parametrize("prediction", ["noise", "velocity"])
@torch.no_grad()
def test_the_spread_behind_three_answers_equals_a_slow_loop(prediction):
    net, _, _ = curved()
    path = LINEAR if prediction == "noise" else FLOW
    x, noise = random(2, 1, 4, 4), random(3, 5, 2, 1, 4, 4, seed=1)
    field = Field(model_of(net, path, prediction), None, 2)
    centred, variance = answer_spread(field, x, 0.6, noise)
    own = slow_answer(net, prediction, x, 0.6, [])
    answers = [slow_answer(net, prediction, x, 0.6, noise[:, m]) for m in range(5)]
    mean = sum(answers) / 5
    torch.testing.assert_close(
        centred, sum((a - own) ** 2 for a in answers) / 5, rtol=1e-8, atol=0
    )
    torch.testing.assert_close(
        variance, sum((a - mean) ** 2 for a in answers) / 4, rtol=1e-8, atol=0
    )
    assert field.evaluations == 1 + 3 * 5


@pytest.mark.parametrize(
    ("path", "prediction", "solver"), [(FLOW, "velocity", Euler(10)), (LINEAR, "noise", DDIM(10))]
)
def test_rounds_cost_an_answer_per_draw_and_do_not_depend_on_the_batch(path, prediction, solver):
    def found(numbers, **options):
        start = start_of(model_of(curved()[0], path, prediction), solver, shape=(1, 4, 4))
        noise = SampleNoise(3, numbers, (1, 4, 4))
        return aleatoric(replace(start, noise=noise), draws=4, **options)

    together = found([0, 1, 2], rounds=3)
    assert together.nfe == 10 + 2 * (1 + 3 * 4)
    alone = found([2], rounds=3)
    torch.testing.assert_close(alone.variance[0], together.variance[2], rtol=1e-6, atol=1e-7)
    plain, once = found([0, 1, 2]), found([0, 1, 2], rounds=1)
    assert torch.equal(plain.variance, once.variance) and torch.equal(plain.centred, once.centred)
    assert not torch.allclose(plain.variance, together.variance, rtol=1e-2)
    with pytest.raises(UserError, match="rounds must be a whole number >= 1, got 0"):
        found([0], rounds=0)
