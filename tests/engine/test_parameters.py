"""Parameters are checked in one place, and what falls short is refused with the figure."""

from __future__ import annotations

import pickle

import pytest

from cipherlm.engine import (
    PRESETS,
    InsecureParametersError,
    Parameters,
    ParametersError,
)
from cipherlm.engine.parameters import POST_QUANTUM_LIMITS, POST_QUANTUM_PRESETS
from cipherlm.linear import plan

LIMITS = {12: 109, 13: 218, 14: 438, 15: 881, 16: 1747}


@pytest.mark.parametrize("log_degree", [12, 13, 14])
def test_presets_are_secure(log_degree):
    parameters = Parameters.preset(log_degree)
    assert parameters.log_qp < LIMITS[log_degree]
    assert parameters.slots == parameters.degree // 2 == 2 ** (log_degree - 1)
    assert parameters.max_level == len(PRESETS[log_degree]["log_q"]) - 1


@pytest.mark.parametrize("log_degree", sorted(POST_QUANTUM_PRESETS))
def test_post_quantum_presets_are_secure_and_have_the_same_levels(log_degree):
    """By the Standard's table for attacks with quantum computers, which the usual presets exceed."""
    usual, parameters = Parameters.preset(log_degree), Parameters.preset(log_degree, post_quantum=True)
    assert POST_QUANTUM_LIMITS == {12: 101, 13: 202, 14: 411, 15: 827}
    assert parameters.log_qp <= POST_QUANTUM_LIMITS[log_degree] < usual.log_qp
    assert (parameters.post_quantum, usual.post_quantum) == (True, False)
    assert parameters.max_level == usual.max_level


def test_linear_layers_have_post_quantum_parameters():
    assert Parameters(**plan._LITERAL).post_quantum


def test_a_post_quantum_preset_is_held_to_its_limit(monkeypatch):
    monkeypatch.setitem(POST_QUANTUM_PRESETS, 14, PRESETS[14])
    with pytest.raises(InsecureParametersError, match=r"is 43\d\.\d+, .* allow 411"):
        Parameters.preset(14, post_quantum=True)


@pytest.mark.parametrize("log_degree", sorted(LIMITS))
def test_one_bit_too_many_is_refused_with_the_figure(log_degree):
    limit = LIMITS[log_degree]
    sizes = [30] * (limit // 30)
    sizes[0] += limit + 1 - sum(sizes)
    with pytest.raises(
        InsecureParametersError, match=rf"log2\(QP\) is {limit}\.\d+|log2\(QP\) is {limit + 1}\."
    ):
        Parameters(log_degree, sizes[:-1], sizes[-1:], 25)


def test_the_limit_is_exact():
    """50 + 8 * 36 + 50 + 50 bits are 438.00004: over the limit by less than a bit."""
    with pytest.raises(InsecureParametersError, match=r"438\.00004"):
        Parameters(14, [50] + [36] * 8, [50, 50], 36)
    assert Parameters(14, [50] + [36] * 8, [50, 49], 36).log_qp < 438


def test_the_conjugate_invariant_ring_has_the_limit_of_its_own_degree():
    with pytest.raises(InsecureParametersError, match="218"):
        Parameters(13, [50] * 4, [50], 40, "conjugate_invariant")
    parameters = Parameters(13, [50] * 3, [50], 40, "conjugate_invariant")
    assert parameters.real
    assert parameters.slots == parameters.degree


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((11, [20], [20], 15), "ring degree"),
        ((17, [20], [20], 15), "ring degree"),
        ((13, [], [40], 30), "moduli"),
        ((13, [40], [], 30), "moduli"),
        ((13, [19], [40], 15), "20 to 60 bits"),
        ((13, [61], [40], 15), "20 to 60 bits"),
        ((13, [40, 40], [40], 60), "scale"),
        ((13, [40, 40], [40], 5), "scale"),
        ((13, [40, 40], [40], 30, "cyclic"), "ring"),
    ],
)
def test_nonsense_is_refused(arguments, message):
    with pytest.raises(ParametersError, match=message):
        Parameters(*arguments)


def test_primes_can_be_given_and_must_be_primes():
    parameters = Parameters.preset(13)
    literal = parameters.to_dict()
    assert Parameters.from_dict(literal) == parameters
    literal["q"] = [literal["q"][0] + 2, *literal["q"][1:]]
    with pytest.raises(ParametersError, match="prime"):
        Parameters.from_dict(literal)
    shared = {**parameters.to_dict(), "p": [parameters.q[0]]}
    with pytest.raises(ParametersError, match="in both moduli"):
        Parameters.from_dict(shared)
    with pytest.raises(ParametersError):
        Parameters.from_dict({**parameters.to_dict(), "q": [2**70]})
    with pytest.raises(ParametersError):
        Parameters.from_dict({**parameters.to_dict(), "hint": "unknown"})


def test_bytes_and_pickle():
    parameters = Parameters.preset(12)
    assert Parameters.from_bytes(parameters.to_bytes()) == parameters
    assert pickle.loads(pickle.dumps(parameters)) == parameters
    assert len({parameters, Parameters.preset(12), Parameters.preset(13)}) == 2
