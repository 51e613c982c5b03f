"""The classifier between rounds: new weights, the exact mean, and who is sent what."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator import classifier
from coordinator.aggregation import Contribution
from coordinator.classifier import GlobalClassifier
from coordinator.handback import Holder
from shared.errors import NumericsError
from tests.support.closeness import relative
from tests.support.tiny_models import CLASSIFYING, tiny_classifier, tiny_model


def weights(seed):
    random = np.random.default_rng(seed)
    shapes = {"classifier.weight": (3, 8), "classifier.bias": (3,)}
    return {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def contribution(device, examples, classifier=None):
    return Contribution(
        device=device,
        split_layer=1,
        target_tokens=examples,
        adapters=None,
        classifier=classifier or {},
    )


def holder(name, *, fresh=False):
    return Holder(name=name, blocks=range(1), ranks={}, scalings={}, fresh=fresh)


@pytest.mark.parametrize("family", CLASSIFYING)
def test_new_weights_are_those_of_hugging_face_and_follow_from_the_seed(family):
    architecture = tiny_classifier(family).architecture
    made = classifier.initial(architecture, seed=3).weights
    model = tiny_classifier(family).hugging_face()
    assert {n: w.shape for n, w in made.items()} == {
        n: tuple(p.shape)
        for n, p in model.named_parameters()
        if n.startswith(architecture.family.classifier.module + ".")
    }
    again = classifier.initial(architecture, seed=3).weights
    other = classifier.initial(architecture, seed=4).weights
    for name, weight in made.items():
        np.testing.assert_array_equal(weight, again[name])
        if name.endswith("bias"):
            assert not weight.any()
        else:
            assert weight.std() == pytest.approx(0.02, rel=0.3)
            assert relative(other[name], weight) > 1


def test_a_run_that_writes_has_no_classifier():
    architecture = tiny_model("gpt2").architecture
    assert not classifier.initial(architecture, seed=0).weights


def test_the_mean_is_weighted_by_examples():
    one, two = weights(1), weights(2)
    mean = classifier.averaged(
        GlobalClassifier(weights=weights(0)),
        [contribution("a", 30, one), contribution("b", 10, two), contribution("lost", 60)],
    )
    for name, weight in mean.weights.items():
        assert relative(weight, 0.75 * one[name] + 0.25 * two[name]) < 1e-7
        assert weight.dtype == np.float32
    assert mean.sole is None


def test_where_nobody_delivered_it_stays_and_belongs_to_nobody():
    old = GlobalClassifier(weights=weights(0), sole="a")
    new = classifier.averaged(old, [contribution("a", 5)])
    assert new.weights is old.weights
    assert new.sole is None


def test_only_a_device_alone_with_its_own_outcome_is_sent_nothing():
    after = classifier.averaged(
        GlobalClassifier(weights=weights(0)), [contribution("a", 5, weights(1))]
    )
    assert not classifier.handed_to("a", after, [holder("a")])
    for device, holders in (
        ("a", [holder("a", fresh=True)]),
        ("a", [holder("a"), holder("b")]),
        ("b", [holder("b")]),
    ):
        assert classifier.handed_to(device, after, holders) == after.weights


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"classifier.bias": None}, "classifier.bias is missing"),
        ({"score.weight": np.zeros((3, 8), np.float32)}, "score.weight is missing or not"),
        ({"classifier.bias": np.zeros(4, np.float32)}, r"expected float32\[3\], got float32\[4\]"),
        ({"classifier.bias": np.zeros(3)}, r"got float64\[3\]"),
        ({"classifier.bias": np.full(3, np.nan, np.float32)}, "NaN or infinity"),
    ],
)
def test_what_a_device_delivers_is_checked(changes, says):
    delivered = {n: w for n, w in (weights(1) | changes).items() if w is not None}
    with pytest.raises(NumericsError, match=says):
        classifier.check(delivered, like=GlobalClassifier(weights=weights(0)))
