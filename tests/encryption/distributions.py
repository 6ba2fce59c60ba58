"""Assertions about samples, each with a known probability of a false alarm.

An assertion fails for samples of the right distribution with probability at most ALARM: a threshold is taken
for ALARM divided by the number of comparisons that the assertion makes. No test makes as many as 1,000
assertions, so that a test fails by chance with probability below 1e-9.

Thresholds are those of normal variables, and what is compared are means of n >= 2^12 terms. At z deviations
their tail is that of the normal one times about exp(z^3 k / (6 sqrt(n))), where k is the skewness of a term
(Cramer): 50 for squares of Gaussians (2.8 at z = 8), 60 for products of the sparsest terms that are compared
here, ternary ones that are zero four times in five (2.0 at z = 9.2). ALARM has room for it.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

ALARM = 1e-14
SIGMA = 3.2  # of errors: a Gaussian rounded to integers, cut off at six deviations


def deviations(comparisons: int) -> float:
    """Return how many standard deviations the worst of so many normal variables exceeds with ALARM."""
    return -NormalDist().inv_cdf(ALARM / (2 * comparisons))


def assert_frequencies(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Assert that counts (..., bins) come from the probabilities, by chi-square.

    Laurent and Massart (2000), lemma 1: chi-square with k degrees of freedom is k + 2 sqrt(k x) + 2 x or
    more with probability at most exp(-x). Bins expect 40 or more, which makes it a chi-square.
    """
    expected = counts.sum(-1, keepdims=True) * probabilities
    assert expected.min() >= 40, "too few samples for these bins"
    distance = ((counts - expected) ** 2 / expected).sum(-1)
    freedom, x = len(probabilities) - 1, math.log(distance.size / ALARM)
    limit = freedom + 2 * math.sqrt(freedom * x) + 2 * x
    assert distance.max() < limit, f"chi-square of {distance.max():.0f}, where {limit:.0f} is the limit"


def assert_gaussian(errors: np.ndarray, sigma: float = SIGMA) -> None:
    """Assert that polynomials (count, N) are errors: Gaussians rounded to integers, up to six deviations."""
    assert np.abs(errors).max() <= 6 * sigma
    # The variance of a sum of squares of n Gaussians is 2 n sigma^4. Rounding adds 1/12 to each (Sheppard).
    ratio = (errors.astype(float) ** 2).mean(1) / (sigma**2 + 1 / 12)
    limit = deviations(len(ratio)) * math.sqrt(2 / errors.shape[1])
    assert np.abs(ratio - 1).max() < limit, f"variances {ratio.min():.3f} to {ratio.max():.3f} times theirs"
    edges = np.round(sigma * np.linspace(-2.7, 2.7, 18)) + 0.5
    below = np.array([NormalDist(0, sigma).cdf(edge) for edge in edges])
    counts = np.bincount(np.searchsorted(edges, errors.reshape(-1)), minlength=len(edges) + 1)
    assert_frequencies(counts, np.diff(below, prepend=0, append=1))


def assert_ternary(polynomials: np.ndarray) -> None:
    """Assert that coefficients (count, N) are -1, 0 and 1, a third each, in each polynomial."""
    assert set(np.unique(polynomials)) == {-1, 0, 1}
    counts = np.stack([(polynomials == value).sum(1) for value in (-1, 0, 1)], axis=1)
    assert_frequencies(counts, np.full(3, 1 / 3))


def assert_uniform(polynomials: np.ndarray, modulus: int) -> None:
    """Assert that integers (count, N) are uniform in [0, modulus): their high bits and their low ones.

    The modulus is of 20 bits or more, so that a low bin is as likely as the next to within 2^-14.
    """
    bins = 32
    for values in (polynomials * bins // modulus, *(polynomials >> shift & bins - 1 for shift in (0, 6))):
        counts = np.stack([np.bincount(row.astype(np.int64), minlength=bins) for row in values])
        assert_frequencies(counts, np.full(bins, 1 / bins))


def assert_unrelated(polynomials: np.ndarray) -> None:
    """Assert that polynomials (count, N) are neither correlated with each other nor within themselves.

    Every two are compared, each with itself too, under every cyclic shift, in their values and in their
    absolute values. Correlations of independent coefficients have the deviation 1 / sqrt(N).
    """
    count, size = polynomials.shape
    for values in (polynomials.astype(float), np.abs(polynomials).astype(float)):
        values -= values.mean(1, keepdims=True)
        assert (values.std(1) > 0).all(), "a constant polynomial"
        spectra = np.fft.rfft(values / values.std(1, keepdims=True))
        limit = deviations(count * (count + 1) * size) * math.sqrt(size)
        for i, spectrum in enumerate(spectra):
            products = np.abs(np.fft.irfft(spectra[i:] * spectrum.conj(), size))
            products[0, 0] = 0  # a polynomial with itself
            other, shift = np.unravel_index(products.argmax(), products.shape)
            assert products.max() < limit, f"polynomial {i} goes with {i + other}, shifted by {shift}"


def assert_fresh(seeds: list[bytes]) -> None:
    """Assert that seeds are random: no two have much in common, and of 80 or more no bit is always the same.

    Two random seeds of 256 bits differ in 128, with a deviation of 8 and lighter tails than normal ones. A
    bit is the same in 80 seeds with probability 2^-79.
    """
    bits = np.unpackbits(np.frombuffer(b"".join(seeds), np.uint8).reshape(len(seeds), -1), axis=1).astype(int)
    assert bits.shape[1] == 256
    signs = 2 * bits - 1
    agreement = signs @ signs.T  # 256 - 2 * (bits that differ)
    np.fill_diagonal(agreement, 0)
    limit = deviations(len(seeds) ** 2) * 16
    assert np.abs(agreement).max() < limit, "two seeds that have something in common"
    if len(seeds) >= 80:
        assert (bits.min(0) == 0).all()
        assert (bits.max(0) == 1).all()
