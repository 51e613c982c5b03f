"""The seed of one micro-batch's dropout."""

from __future__ import annotations

from shared.dropout_seed import dropout_seed


def test_every_part_of_the_key_changes_the_seed():
    key = {"device_id": "nano", "step": 3, "micro_batch": 1, "side": "device"}
    changes = [{"device_id": "orin"}, {"step": 4}, {"micro_batch": 0}, {"side": "server"}]
    seeds = [dropout_seed(0, **key), dropout_seed(1, **key)]
    seeds += [dropout_seed(0, **{**key, **change}) for change in changes]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert dropout_seed(0, **key) == seeds[0]
