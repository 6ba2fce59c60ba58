"""Encrypted products against NumPy, with stated errors."""

import json

import numpy as np
import pytest

from cipherlm.engine import Evaluator
from cipherlm.linear.client import LinearClient
from cipherlm.linear.local import LocalProducts, SimulatedProducts
from cipherlm.linear.plan import Plan, make_plan
from cipherlm.linear.products import LinearGroup
from cipherlm.linear.server import LinearServer

GROUPS = [
    LinearGroup("q", ("q", "k"), 48, (48, 16)),
    LinearGroup("wide", ("wide",), 200, (600,)),
    LinearGroup("long", ("long",), 5000, (3,)),
]
RELATIVE = 5e-4
"""The greatest error of a product, relative to the norm of its input times the root mean square of the
weights."""


@pytest.fixture(scope="module")
def weights():
    generator = np.random.default_rng(3)
    return {g.name: generator.normal(0, 0.05, (g.rows, g.in_features)).astype(np.float32) for g in GROUPS}


@pytest.fixture(scope="module")
def plan(weights):
    return make_plan(GROUPS, weights, training=True)


@pytest.fixture(scope="module")
def products(plan, weights):
    return LocalProducts(plan, weights)


def relative_error(found, x, matrix):
    scale = np.linalg.norm(x, axis=1, keepdims=True) * np.sqrt((matrix.astype(float) ** 2).mean())
    return (found - x @ matrix.T.astype(float)) / scale


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("group", [group.name for group in GROUPS])
def test_products_on_ciphertexts(products, weights, group, transposed):
    matrix = weights[group].T if transposed else weights[group]
    x = np.random.default_rng(4).normal(size=(3, matrix.shape[1]))
    x[1] *= 1e-20  # norms travel with the client alone: tiny and huge inputs are as precise
    x[2, 0] = 1e6
    found = products.product(group, x, transposed=transposed)
    assert np.abs(relative_error(found, x, matrix)).max() < RELATIVE


def test_simulated_errors_are_those_of_ciphertexts(plan, products, weights):
    x = np.random.default_rng(5).normal(size=(12, 200))
    simulated = SimulatedProducts(plan, weights)
    ratio = (
        relative_error(simulated.product("wide", x), x, weights["wide"]).std()
        / relative_error(products.product("wide", x), x, weights["wide"]).std()
    )
    assert 0.7 < ratio < 1.4


@pytest.mark.parametrize("group", ["q", "wide"])
def test_no_input_runs_over(products, plan, weights, group):
    """The inputs that make the greatest outputs, and those whose slots are all alike."""
    matrix = weights[group].astype(float)
    singular = np.linalg.svd(matrix)[2][:2]
    inputs = np.concatenate(
        [singular, np.ones((1, matrix.shape[1])), np.eye(matrix.shape[1])[:2], matrix[:2]]
    )
    rows, _ = products.client.encrypt(group, inputs)
    for row in products.server.multiply(products._evaluator, group, rows):
        for ciphertext in row:
            greatest = products.client.secret_key.decrypt_plaintext(ciphertext).greatest
            assert 0 < greatest < 0.9


def test_zero_and_nothing(products):
    assert np.abs(products.product("q", np.zeros((1, 48)))).max() < 1e-3
    assert products.product("q", np.zeros((0, 48))).shape == (0, 64)


def test_saved_matrices_are_mapped(tmp_path, weights):
    groups, own = GROUPS[:2], {group.name: weights[group.name] for group in GROUPS[:2]}
    plan = make_plan(groups, own)
    server = LinearServer.build(plan, own)
    server.save(tmp_path)
    loaded = LinearServer.load(tmp_path)
    assert loaded.plan.digest == plan.digest
    assert loaded.nbytes == server.nbytes
    client = LinearClient(loaded.plan)
    evaluator = Evaluator(loaded.plan.parameters, client.evaluation_keys())
    x = np.random.default_rng(6).normal(size=(1, 48))
    rows, norms = client.encrypt("q", x)
    found = client.decrypt("q", loaded.multiply(evaluator, "q", rows), norms)
    assert np.abs(relative_error(found, x, own["q"])).max() < RELATIVE
    with pytest.raises(ValueError, match="without training"):
        loaded.multiply(evaluator, "q", rows, transposed=True)
    matrices = tmp_path / "matrices.int16"
    matrices.write_bytes(matrices.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        LinearServer.load(tmp_path)
    matrices.unlink()
    with pytest.raises(FileNotFoundError):
        LinearServer.load(tmp_path)


def test_the_plan_has_no_more_keys_than_needed_and_travels_as_json(plan):
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.digest == plan.digest
    assert len(plan.rotations) < 128
    assert plan.parameters.log_qp <= 109


def damage(values, *path, value):
    copy = json.loads(json.dumps(values))
    target = copy
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["version"], 99, "another CipherLM"),
        (["parameters", "log_n"], 11, "parameters"),
        (["groups", 0, "in_features"], 49, "another shape"),
        (["forward", "q", "packing", "runs"], 0, "fit its slots"),
        (["forward", "q", "packing", "runs"], 10**9, "fit its slots"),
        (["forward", "q", "packing", "outputs"], 10**9, "outputs"),
        (["forward", "q", "packing", "inputs"], True, "integers"),
        (["forward", "q", "packing", "slots"], 2**40, "another shape"),
        (["forward", "q", "giant_step"], 3, "giant step"),
        (["forward", "q", "first"], 60, "rounds everything"),
        (["forward", "q", "input_scale"], "1", "scale"),
        (["forward", "q", "input_scale"], float("nan"), "scale"),
        (["forward"], {}, "groups"),
        (["backward", "q"], None, "damaged"),
    ],
)
def test_damaged_plans_are_refused(plan, path, value, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_dict(damage(plan.to_dict(), *path, value=value))


def test_inputs_that_no_client_makes_are_refused(products, plan):
    client, evaluator, server = products.client, products._evaluator, products.server
    rows, _ = client.encrypt("q", np.ones((1, 48)))
    with pytest.raises(ValueError, match="ciphertexts"):
        server.multiply(evaluator, "q", [rows[0] * 2])
    with pytest.raises(ValueError, match="no product"):
        server.multiply(evaluator, "elsewhere", rows)
    with pytest.raises(ValueError, match="scale"):
        server.multiply(evaluator, "q", [[client.secret_key.encrypt(np.ones(4), 0, 2.0**20)]])
    product = evaluator.add(rows[0][0], rows[0][0])
    with pytest.raises(ValueError, match="seeded"):
        server.multiply(evaluator, "q", [[product]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(products, bad):
    with pytest.raises(ValueError, match="not finite"):
        products.product("q", np.full((1, 48), bad))


def test_weights_that_are_not_finite_are_refused(weights):
    with pytest.raises(ValueError, match="not all finite"):
        make_plan(GROUPS[:1], {"q": np.full((64, 48), np.nan, np.float32)})
    with pytest.raises(ValueError, match="shape"):
        make_plan(GROUPS[:1], {"q": weights["q"][:3]})
