"""Which device gets which record: shares as they should be drawn, and rules that make no sense."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from coordinator.sharding import Classes, Rule, apportioned, split
from shared.errors import ConfigError, DataError

ABC = ("ada", "bob", "cyd")


def classes(*counts):
    """Return records of as many classes, in turns as long as there are some left."""
    index_N = np.concatenate([np.full(count, i) for i, count in enumerate(counts)])
    turn_N = np.concatenate([np.arange(count) for count in counts])
    names = tuple(f"class-{i}" for i in range(len(counts)))
    return Classes(names, index_N[np.lexsort((index_N, turn_N))].astype(np.int64))


def sizes(parts):
    return [len(part) for part in parts]


def mixtures(of, parts):
    return [np.bincount(of.index_N[part], minlength=len(of.names)).tolist() for part in parts]


def test_iid_parts_are_equal_and_shuffled():
    parts = split(classes(101), Rule(devices=ABC, by="iid"))
    assert sorted(sizes(parts)) == [33, 34, 34]
    assert all(part[-1] - part[0] > 50 for part in parts), "no device has one run of the file"


def test_stated_sizes_are_kept():
    rule = Rule(devices=ABC, by="size", sizes=(5, 3, 1))
    assert sizes(split(classes(90), rule)) == [50, 30, 10]
    assert sum(sizes(split(classes(91), rule))) == 91


def test_a_split_is_the_same_on_every_machine():
    """Recorded once; another version of numpy must not make another split of the same data."""
    of = classes(40, 30, 20, 10)
    parts = [
        part.tolist()
        for rule in (
            Rule(devices=ABC, by="iid", seed=7),
            Rule(devices=ABC, by="label", alpha=0.3, seed=7),
            Rule(devices=ABC, by="size", alpha=2.0, seed=7, min_records=12),
        )
        for part in split(of, rule)
    ]
    assert hashlib.sha256(repr(parts).encode()).hexdigest()[:16] == "484737422feca47f"


def test_another_seed_makes_another_split():
    of = classes(20, 20)
    for by in ("iid", "label", "size"):
        one, other = (split(of, Rule(devices=ABC, by=by, seed=seed)) for seed in (0, 1))
        assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True)), by


@pytest.mark.parametrize("alpha", [0.05, 0.5, 5.0])
def test_shares_have_the_mean_and_variance_of_dirichlet(alpha):
    """Mean 1/D and variance (1/D)(1 - 1/D) / (D alpha + 1), to five standard errors."""
    count, draws, devices = 10_000, 1500, 4
    of = classes(count)
    rules = [
        Rule(devices=("a", "b", "c", "d"), by="size", alpha=alpha, seed=s) for s in range(draws)
    ]
    shares = np.array([sizes(split(of, rule)) for rule in rules]) / count
    variance = (1 / devices) * (1 - 1 / devices) / (devices * alpha + 1)
    np.testing.assert_allclose(shares.mean(0), 1 / devices, atol=5 * np.sqrt(variance / draws))
    spread = ((shares - 1 / devices) ** 2).std(0) / np.sqrt(draws)
    found = ((shares - 1 / devices) ** 2).mean(0)
    assert (np.abs(found - variance) < 5 * spread).all()


def test_classes_are_drawn_apart():
    """What a device gets of one class says nothing of what it gets of another."""
    drawn = [
        mixtures(of, split(of, Rule(devices=("a", "b"), by="label", seed=seed)))[0]
        for of in [classes(1000, 1000)]
        for seed in range(400)
    ]
    assert abs(np.corrcoef(np.transpose(drawn))[0, 1]) < 5 / np.sqrt(len(drawn))


def test_a_class_is_drawn_by_its_name_whatever_else_there_is():
    of = classes(100, 100)
    rule = Rule(devices=ABC, by="label")
    alone = Classes(of.names[1:], np.zeros(100, dtype=np.int64))
    both = [mixture[1] for mixture in mixtures(of, split(of, rule))]
    assert both == sizes(split(alone, rule))


def test_who_has_too_little_is_filled_up_by_who_has_the_most():
    of = classes(60, 30)
    rule = {"devices": ABC, "by": "size", "sizes": (1e6, 1, 1)}
    assert sizes(split(of, Rule(**rule))) == [88, 1, 1]
    parts = split(of, Rule(**rule, min_records=30))
    assert sizes(parts) == [30, 30, 30]
    assert min(mixture[0] for mixture in mixtures(of, parts)) >= 12, "the giver's mixture, about"


def test_whole_numbers_come_nearest_to_shares():
    assert apportioned(np.array([0.5, 0.3, 0.2]), 10).tolist() == [5, 3, 2]
    assert apportioned(np.array([0.45, 0.45, 0.1]), 1).sum() == 1
    assert apportioned(np.array([0.26, 0.26, 0.48]), 3).tolist() == [1, 1, 1]
    assert apportioned(np.array([1.0]), 0).tolist() == [0]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"devices": ()}, "name at least one"),
        ({"devices": ("a", "b", "a")}, "each one once"),
        ({"alpha": 0.0}, "must be above 0"),
        ({"alpha": -1.0}, "must be above 0"),
        ({"alpha": float("nan")}, "must be above 0"),
        ({"alpha": float("inf")}, "must be above 0"),
        ({"by": "iid", "alpha": 1.0}, "leave it out"),
        ({"by": "size", "sizes": (1, 2, 3), "alpha": 1.0}, "leave it out"),
        ({"by": "label", "sizes": (1, 2, 3)}, "not by label"),
        ({"by": "size", "sizes": (1, 2)}, "2 are stated for 3 devices"),
        ({"by": "size", "sizes": (1, 2, 0)}, "above 0"),
        ({"by": "size", "sizes": (1, 2, float("inf"))}, "above 0"),
        ({"min_records": 0}, "must be 1 or more"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        Rule(**{"devices": ABC, "by": "label", **wrong})


def test_too_few_records_are_told_with_both_numbers():
    with pytest.raises(DataError, match="2 records are too few for 3 devices with 1 or more"):
        split(classes(2), Rule(devices=ABC, by="iid"))
    with pytest.raises(DataError, match="14 records are too few for 3 devices with 5 or more"):
        split(classes(14), Rule(devices=ABC, by="iid", min_records=5))
