"""
Scaling laws: what loss so many parameters N and training tokens D come to, L(N, D) = E + A / N^alpha + B / D^beta, in nats per
token, and what N and D are the best for a budget of C = 6 N D floating-point operations.

Source: Hoffmann et al. 2022 ("Chinchilla"), section 3.3 and appendix D.3. E is what a perfect model would still lose on that
text; the two terms are what a model of finite size and a training of finite length add. N counts all parameters.
"""

import math
from dataclasses import dataclass

import numpy as np

from configurator import UserError


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta; with A = 0 a law of D for models of one size."""
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n, d):
        """Nats per token after `d` tokens with `n` parameters; numbers or arrays."""
        return self.E + self.A / n ** self.alpha + self.B / d ** self.beta

    def optimum(self, flops):
        """(N, D) of the least loss with 6 N D = `flops` (eq. 4). Raises UserError for a law that knows no best size."""
        if self.A <= 0:
            raise UserError('fit: the runs are of one size, and so their law knows no best one; add runs of other sizes')
        try:
            g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
            n = g * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        except (OverflowError, ZeroDivisionError):
            n = math.inf
        if not 1e3 < n < 1e15:
            raise UserError(f'fit: the law of these runs has its best size at {n:.3g} parameters; their losses do not fall '
                            'with size and length as in a law')
        return n, flops / 6 / n


# Hoffmann et al. 2022, eq. 10, as printed; and Besiroglu et al. 2024, who found that fit not to have converged (table 1)
LAWS = {
    'hoffmann': Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
    'besiroglu': Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
}


DELTA = 1e-3  # of the Huber loss, in log nats: residuals beyond count linearly, so that single bad runs do not bend the law


def fit(n, d, loss, resamples=400, seed=0):
    """
    The law of runs with `n` parameters, `d` tokens and a final `loss` (arrays), and the laws of so many `resamples` of the
    runs, whose spread is its uncertainty. If all are of one size it is a law of D alone.

    As in the paper: least Huber loss (delta 1e-3) of the logarithms, by L-BFGS from many starts. Raises UserError for runs that
    are too few, and where scipy is missing.
    """
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise UserError('fit needs a package: pip install scipy') from None
    one_size = len(set(n)) == 1
    x = np.log([d] if one_size else [n, d])  # a row for each term
    middle = x.mean(1)
    x = x - middle[:, None]  # around which the search is easy: far from it, a term's two constants do nearly the same
    unknowns = 1 + 2 * len(x)
    if len(loss) <= unknowns or len(set(d)) < 3 or len(set(n)) == 2:
        raise UserError(f'fit: {len(loss)} finished runs of {len(set(n))} sizes and {len(set(d))} lengths are too few for '
                        f'{unknowns} constants; train at least 4 lengths of one size, or 3 lengths of 3 sizes')

    def objective(p, x, target):
        """The Huber loss and its gradient, of log E, the terms' logarithms at the middle of the runs, and their exponents."""
        terms = np.vstack([np.full(x.shape[1], p[0]), p[1:len(x) + 1, None] - p[len(x) + 1:, None] * x])
        top = terms.max(0)
        share = np.exp(terms - top)
        total = share.sum(0)
        residual = top + np.log(total) - target
        slope = residual.clip(-DELTA, DELTA)
        value = np.where(abs(residual) <= DELTA, residual ** 2 / 2, DELTA * (abs(residual) - DELTA / 2)).sum()
        by_term = share / total * slope
        return value / DELTA ** 2, np.concatenate([by_term.sum(1), -(by_term[1:] * x).sum(1)]) / DELTA ** 2

    def best(starts, rows):
        return min((minimize(objective, start, (x[:, rows], target[rows]), method='L-BFGS-B', jac=True, bounds=bounds,
                             options={'maxiter': 300}) for start in starts), key=lambda found: found.fun).x

    def law(p):
        exponents = p[len(x) + 1:]
        coefficients = np.exp(p[1:len(x) + 1] + exponents * middle)
        a, alpha = (0.0, 0.0) if one_size else (coefficients[0], exponents[0])
        return Law(*map(float, (math.exp(p[0]), a, coefficients[-1], alpha, exponents[-1])))

    target, rows = np.log(loss), np.arange(len(loss))
    bounds = [(-10, None)] + [(None, None)] * len(x) + [(0.01, 3)] * len(x)
    exponents = np.array(np.meshgrid(*[[0.2, 0.5, 1.0]] * len(x))).reshape(len(x), -1).T
    starts = [np.concatenate([[target.min() + math.log(rest)], np.full(len(x), target.min() + math.log(1 - rest)), power])
              for rest in (0.3, 0.6, 0.9) for power in exponents]  # E begins as a share of the least loss
    found = best(starts, rows)
    rng, spread = np.random.default_rng(seed), []
    while len(spread) < resamples:
        drawn = rng.choice(rows, len(rows))
        if len(set(d[drawn])) >= 3 and (one_size or len(set(n[drawn])) >= 3):
            spread.append(law(best([found], drawn)))
    return law(found), spread


def interval(values, share=0.8):
    """The middle `share` of the values."""
    return tuple(np.quantile(list(values), ((1 - share) / 2, (1 + share) / 2)))


def constants(law, spread):
    """{name: (value, lowest, highest)} of a fitted law, with the middle 80% of its resamples."""
    names = [name for name in Law.__annotations__ if law.A or name not in ('A', 'alpha')]
    return {name: (getattr(law, name), *interval(getattr(other, name) for other in spread)) for name in names}
