"""tools/compare_checkouts.py sees what differs: the last bit of a number, another order, what is missing or new."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"tools"))
import compare_checkouts
from compare_checkouts import compare, row_of

VALUES = {"logs/batches 0": [["loss", .25], ["n", 3]], "records/params.json": {"trainer": {"params": {"seed": 1, "clip_grad": None}}}}
ARRAYS = {"weights/layer": np.arange(6, dtype=np.float32).reshape(2, 3), "tractograms/det/points": np.array([[1., np.nan]])}


@pytest.fixture
def results(tmp_path):
    "Write the results of a recipe in two checkouts, changed as asked; give what `compare` finds."
    def of(values=None, arrays=None, name="toy", drop=()):
        both = (VALUES, ARRAYS), ({**VALUES, **(values or {})}, {**ARRAYS, **(arrays or {})})
        for folder, (v, a) in zip((tmp_path/"before", tmp_path/"after"), both):
            if folder.name == "after": v, a = ({k: o for k, o in some.items() if k not in drop} for some in (v, a))
            folder.mkdir(exist_ok=True)
            np.savez(folder/f"{name}.npz", **a)
            (folder/f"{name}.json").write_text(json.dumps({"order": [*v, *a], "values": v}))
        return compare(tmp_path/"before", tmp_path/"after", name)[0]
    return of


def told(found): return [f"{quantity}: {sentence}" for _, _, bad in found.values() for quantity, sentence in bad]


def test_the_same_is_equal(results):
    assert row_of("toy", results()) == "| toy | 1 logs, 1 records, 1 weights, 1 tractograms | equal |"


def test_the_last_bit_counts(results):
    changed = ARRAYS["weights/layer"].copy()
    changed[1, 2] = np.nextafter(changed[1, 2], np.float32(9))
    found = results(arrays={"weights/layer": changed})
    assert told(found) == ["weights/layer: 1 of 6 values, most at [1, 2]: np.float32(5.0), now np.float32(5.0000005)"]
    assert row_of("toy", found).endswith("| 1 weights differ (by 4.77e-07) |")
    assert told(results({"logs/batches 0": [["loss", .25000000000000006], ["n", 3]]})) == [
        "logs/batches 0: [0][1] was 0.25, now 0.25000000000000006"]
    assert len(told(results(arrays={"weights/layer": -0.*ARRAYS["weights/layer"]}))) == 1
    assert len(told(results(arrays={"weights/layer": ARRAYS["weights/layer"].astype(float)}))) == 1


def test_nearly_is_enough_where_it_is_said(results, monkeypatch):
    changed = {"tractograms/det/points": np.array([[1. + 5e-7, np.nan]])}
    assert len(told(results(arrays=changed))) == 1
    monkeypatch.setitem(compare_checkouts.NEARLY, ("toy", "tractograms"), 1e-6)
    assert row_of("toy", results(arrays=changed)).endswith("| equal, tractograms nearly (by 5e-07) |")
    assert len(told(results(arrays={"tractograms/det/points": np.array([[1.1, np.nan]])}))) == 1
    assert len(told(results(arrays={"tractograms/det/points": np.array([[np.nan, 1.]])}))) == 1


def test_missing_new_and_in_another_order(results, monkeypatch):
    assert told(results(drop=["weights/layer"])) == ["weights/layer: not there AFTER"]
    assert told(results({"error": "KeyError"})) == ["error: failed AFTER: KeyError"]
    assert "order of keys" in told(results({"records/params.json": {"trainer": {"params": {"clip_grad": None, "seed": 1}}}}))[0]
    more = {"records/params.json": {"trainer": {"params": {"seed": 1, "clip_grad": None, "new": 2}}}}
    assert told(results(more)) == ["records/params.json: trainer.params.new was not there, now 2"]
    monkeypatch.setitem(compare_checkouts.NEW_KEYS, "trainer.params.new", 2)
    assert not told(results(more))
