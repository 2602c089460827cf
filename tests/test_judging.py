"""Tractograms judged: the challenge's layout and its rules, measures against hand, numpy and dipy, many files at once, bad input in one sentence."""
import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from dipy.segment.bundles import ba_analysis
from dipy.tracking.utils import density_map as dipy_density

import dwiml_nb.core.sizes as sizes
import dwiml_nb.evaluation.judging as judging
from dwiml_nb.cli.common import run_command
from dwiml_nb.cli.tracking import dwiml_score
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.lines import resample_step
from dwiml_nb.core.phantom import write_phantom
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.space import Grid
from dwiml_nb.core.tractograms import Tractogram, load_tractogram, save_tractogram
from dwiml_nb.evaluation.bundles import REASONS, judge_in_turn, score_tractogram
from dwiml_nb.evaluation.judging import bundle_adjacency, judge_tractogram
from dwiml_nb.evaluation.references import SEGMENTATION, TRACTOMETRY, bundle_of_part, load_reference
from dwiml_nb.evaluation.visits import density_correlation, density_in_turn, density_map, dice, weighted_dice

GRID = Grid(np.eye(4), (20, 10, 10))
LINES = {  # name -> points at z = 5, what must be said of it, its bundle
    "in the mask": ([(1, 4), (18, 4)], "valid", 0),
    "beside it": ([(1, 6), (18, 6)], "leaves the bundle", 0),
    "by the other way": ([(1, 6), (10, 8), (18, 6)], "valid", 0),
    "by the other way, too far": ([(1, 6), (10, 8), (3, 8), (10, 8), (18, 6)], "too long", 0),
    "B": ([(10, 1), (10, 8)], "valid", 1),
    "B, forth and back": ([(10, 1), (10, 6), (10, 3), (10, 8)], "too long", 1),
    "B, not far enough": ([(10, 2), (10, 4.4)], "one end", -1),
    "C, a detour": ([(5, 1), (5, 2), (1, 2), (1, 1), (5, 1), (5, 8)], "leaves the bundle", 2),
    "C": ([(5, 1), (5, 8)], "valid", 2),
    "of A and B": ([(1, 5), (10, 1)], "two bundles", -1),
    "of one region": ([(1, 4), (1, 6)], "same region", -1),
    "nowhere": ([(8, 5), (12, 5)], "no end", -1),
}
MORE = {"in the mask, almost": ([(1, 4), (14, 4), (16, 7), (18, 4)], "leaves the bundle", 0), "B, a little back": ([(10, 1), (10, 6), (10, 5.2), (10, 8)], "valid", 1)}


def ragged(*lines): return Ragged.from_list([torch.tensor([(*p, 5.) for p in line]).float() for line in lines])


def box(x, y):
    mask = np.zeros(GRID.dimensions, np.uint8)
    mask[x[0]:x[1] + 1, y[0]:y[1] + 1] = 1
    return mask


@pytest.fixture(scope="module")
def challenge(tmp_path_factory):
    "Scoring data as the challenge has them: A in two parts, B and C in one; regions shared, true lines as tractograms, one mask."
    folder = tmp_path_factory.mktemp("scoring_data_Renauld2023")
    for part in ("ROI/all_masks", "ROI/any_masks", "ROI/endpoints", "bundles"): (folder/part).mkdir(parents=True)
    roi = {"endpoints/A_head": box((0, 2), (3, 7)), "endpoints/A_tail": box((17, 19), (3, 7)), "all_masks/A_low": box((0, 19), (0, 5)), "any_masks/A_any": box((10, 10), (8, 8)),
           "endpoints/B_head": box((9, 11), (0, 2)), "endpoints/B_tail": box((9, 11), (8, 9)), "endpoints/C_head": box((5, 6), (0, 1)), "endpoints/C_tail": box((5, 6), (8, 9))}
    for name, mask in roi.items(): nib.save(nib.Nifti1Image(mask, GRID.affine), folder/f"ROI/{name}.nii.gz")
    nib.save(nib.Nifti1Image(box((5, 5), (0, 9)), GRID.affine), folder/"C_mask.nii.gz")
    ends = lambda n: {k: f"ROI/endpoints/{n}_{k}.nii.gz" for k in ("head", "tail")}
    rules = {"A_low": {**ends("A"), "all_mask": "ROI/all_masks/A_low.nii.gz"}, "A_high_part1": {**ends("A"), "any_mask": "ROI/any_masks/A_any.nii.gz", "length": [10, 25]},
             "B": {**ends("B"), "length_y": [5, 8], "length_y_abs": [5, 9], "length_x_abs": [0, 1]}, "C": {**ends("C"), "angle": 300}}
    (folder/SEGMENTATION).write_text(json.dumps(rules))
    (folder/TRACTOMETRY).write_text(json.dumps({"A": {"gt_mask": "bundles/A.trk"}, "B": {"gt_mask": "bundles/B.trk"}, "C": {"gt_mask": "C_mask.nii.gz"}}))
    save_tractogram(Tractogram(ragged([(1, 4), (18, 4)], [(1, 5), (18, 5)]), GRID), folder/"bundles/A.trk")
    save_tractogram(Tractogram(ragged([(10, 1), (10, 8)]), GRID), folder/"bundles/B.trk")
    return folder


@pytest.fixture
def copied(challenge, tmp_path): return Path(shutil.copytree(challenge, tmp_path/"ref"))


# ---- the challenge's layout

def test_the_challenge_is_read(challenge):
    ref = load_reference(challenge)
    assert ref.names == ["A", "B", "C"] and ref.rules.of.tolist() == [0, 0, 1, 2] and list(ref.lines) == ["A", "B"]
    assert ref.rules.head[0] is ref.rules.head[1] and ref.grid.dimensions == GRID.dimensions
    assert load_reference(challenge/SEGMENTATION).names == ref.names
    assert [bundle_of_part(n, ("ICP", "ICP_left"), "") for n in ("ICP_left_part1", "ICP_part1", "ICP")] == [1, 0, 0]


@pytest.mark.parametrize("name", LINES | MORE)
def test_each_rule_of_the_challenge(name, challenge):
    points, reason, bundle = (LINES | MORE)[name]
    for line in (points, points[::-1]):
        scores = score_tractogram(ragged(line), challenge)
        assert (REASONS[scores.reason[0]], scores.bundle[0]) == (reason, bundle)


def test_the_numbers_of_the_challenge(challenge):
    "By hand: a voxel is a unit, lines lie on the centres of voxels."
    j = judge_tractogram(ragged(*[points for points, *_ in LINES.values()]), challenge)
    assert (j.scores.VB, j.scores.n_bundles, j.scores.VS) == (3, 3, 4/12) and (j.scores.IB, j.scores.NC) == (6/12, 2/12)
    a, b, c = j.bundles.values()
    assert (a["n_valid"], b["n_valid"], c["n_valid"]) == (2, 1, 1)
    assert b["OL"] == b["F1"] == b["dice"] == b["weighted_dice"] == b["density_correlation"] == b["adjacency"] == 1 and b["OR"] == 0
    assert (b["volume_mm3"], b["length_mm"]) == (pytest.approx(8), pytest.approx(7))
    assert a["OL"] == 18/36 and a["adjacency"] == .5*(2/2 + 2/2)                  # all within 6 mm of each other
    assert c["OL"] == 8/100 and c["OR"] == 0 and c["dice"] is None and c["adjacency"] is None
    assert j.means["adjacency"] == 1 and a["length_mm"] == pytest.approx((17 + np.hypot(9, 2) + np.hypot(8, 2))/2)


def test_one_file_of_rules_is_enough(copied):
    "As scilpy takes it: each bundle with its own gt_mask, or the mask that its lines are within."
    rules = json.loads((copied/SEGMENTATION).read_text())
    (copied/"mine.json").write_text(json.dumps({"A": rules["A_low"], "B": {**rules["B"], "gt_mask": "bundles/B.trk"}}))
    ref = load_reference(copied/"mine.json")
    assert ref.names == ["A", "B"] and list(ref.lines) == ["B"] and (ref.whole[0] == ref.rules.within[0]).all()


# ---- measures

def test_measures_against_numpy_and_dipy():
    rng = np.random.default_rng(0)
    walks = [np.cumsum(rng.normal(size=(rng.integers(5, 30), 3)), 0).astype(np.float32) + [50, 20, 30] for _ in range(25)]
    affine = np.array([[-2., .1, 0, 90], [.1, 2, 0, -20], [0, 0, 3, -5], [0, 0, 0, 1]])
    a, b = Ragged.from_list([torch.tensor(o).float() for o in walks[:11]]), Ragged.from_list([torch.tensor(o).float() for o in walks[11:]])
    grid = Grid(affine, (50, 50, 30))
    maps = [density_map(o, grid) for o in (a, b)]
    for o, m in zip((a, b), maps): assert np.array_equal(m, dipy_density([x.numpy() for x in resample_step(o, .5)], affine, grid.dimensions))
    both, either = (maps[0] > 0) & (maps[1] > 0), (maps[0] + maps[1]) > 0
    assert dice(*maps) == 2*both.sum()/((maps[0] > 0).sum() + (maps[1] > 0).sum())
    assert weighted_dice(*maps) == pytest.approx((maps[0][both].sum() + maps[1][both].sum())/(maps[0].sum() + maps[1].sum()))
    assert density_correlation(*maps) == pytest.approx(np.corrcoef(maps[0][either], maps[1][either])[0, 1])
    for near in (2., 6., 12.):
        theirs = ba_analysis([o.numpy() for o in a], [o.numpy() for o in b], threshold=near)
        assert bundle_adjacency(a, b, near) == pytest.approx(theirs) == pytest.approx(bundle_adjacency(b, a, near))


def test_some_lines_at_a_time(challenge):
    "The same with any number of them."
    lines, ref = ragged(*[points for points, *_ in (LINES | MORE).values()]), load_reference(challenge)
    reason, bundle, voxels = judge_in_turn(lines, ref)
    for n in (1, 5):
        again = judge_in_turn(lines, ref, n)
        assert np.array_equal(reason, again[0]) and np.array_equal(bundle, again[1]) and [set(o) for o in voxels] == [set(o) for o in again[2]]
        for one, other in zip(density_in_turn(lines, GRID), density_in_turn(lines, GRID, n)): assert np.array_equal(one, other)


def test_adjacency_in_blocks():
    "The same with any number of lines at a time."
    lines = ragged(*[[(x, 0), (x + 9, y)] for x in range(6) for y in (0, 9, 10, 20, 21)])
    whole = judging.has_near(lines[::2], lines[1::2], 1.)
    for block in (1, 5, 512):
        for found, known in zip(judging.has_near(lines[::2], lines[1::2], 1., block), whole): assert np.array_equal(found, known)
    assert 0 < whole[0].sum() < len(whole[0])


# ---- many at once

@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("subjects"), n_subjects=1)/"sub-01"


def test_many_tractograms(phantom, tmp_path, capsys):
    files = []
    for name in ("<b>&one.trk", "two.tck", "three.trx"):
        files.append(str(tmp_path/name))
        source = sorted((phantom/"bundles").glob("*.trk"))[len(files) % 2]
        save_tractogram(load_tractogram(source), files[-1])
    run_command(dwiml_score, [*files, str(phantom), "--out", str(tmp_path/"s.json"), "--html", str(tmp_path/"s.html")])
    told, page, kept = capsys.readouterr().out, (tmp_path/"s.html").read_text(), json.loads((tmp_path/"s.json").read_text())["tractograms"]
    assert list(kept) == files and all(f in told for f in files)
    for f in files:
        alone = judge_tractogram(load_tractogram(f), phantom)
        assert kept[f] == json.loads(json.dumps(alone.as_dict()))
    assert "<b>" not in page and "&lt;b&gt;&amp;one.trk" in page and not re.search(r"(src|href)=", page)
    assert page.count("<details") == 3 and page.split("</table>")[0].count("<tr>") == 4


def test_one_tractogram_keeps_its_layout(phantom, tmp_path):
    "Scripts read VS and bundles at the top of the file: they still do."
    bundle = sorted((phantom/"bundles").glob("*.trk"))[0]
    dwiml_score(str(bundle), str(phantom), str(tmp_path/"s.json"))
    kept, scores = json.loads((tmp_path/"s.json").read_text()), score_tractogram(Ragged.from_list([]), phantom)
    assert set(scores.as_dict()) <= set(kept) and kept["VS"] == 1
    for row in kept["bundles"].values(): assert {"n_valid", "share", "OL", "OR", "F1", "adjacency"} <= set(row)


# ---- bad input

def changed(folder, name, change):
    found = json.loads((folder/name).read_text()); change(found); (folder/name).write_text(json.dumps(found))


@pytest.mark.parametrize("name, change, says", [
    (SEGMENTATION, lambda o: o["B"].pop("head"), "'B' lacks 'head'"), (SEGMENTATION, lambda o: o["B"].update(lenght=[1, 2]), "Did you mean 'length'"),
    (SEGMENTATION, lambda o: o["B"].update(length=[2, 1]), "'length' of 'B' is not a range"), (SEGMENTATION, lambda o: o["B"].update(angle="wide"), "the angle of 'B'"),
    (SEGMENTATION, lambda o: o.update(B={"endpoints": "x.nii.gz"}), "one mask for both ends"), (SEGMENTATION, lambda o: o.update(D=o["B"]), "'D' is no part of a bundle"),
    (SEGMENTATION, lambda o: o.update(B=[1]), "'B' is not described"), (SEGMENTATION, lambda o: o.clear(), "names no bundle"), (SEGMENTATION, lambda o: o.pop("C"), "which lines belong to bundle 'C'"),
    (TRACTOMETRY, lambda o: o.update(C={}), "where bundle 'C' lies"), (TRACTOMETRY, lambda o: o["B"].update(gt_mask="bundles/none.trk"), "none.trk: no such tractogram"),
    (SEGMENTATION, lambda o: o["B"].update(head="none.nii.gz"), "none.nii.gz: no such mask")])
def test_what_is_not_the_challenge(copied, name, change, says):
    changed(copied, name, change)
    with pytest.raises(DataProblem, match=says): load_reference(copied)


def test_bad_files_end_in_a_sentence(copied, tmp_path, capsys):
    good = copied/"bundles/A.trk"
    (tmp_path/"cut.trk").write_bytes(good.read_bytes()[:-7])
    save_tractogram(Tractogram(ragged([(500, 500), (510, 500)]), GRID), tmp_path/"far.trk")
    for words, says in (([good, tmp_path/"none.trk", copied], "none.trk: no such tractogram"), ([tmp_path/"cut.trk", good, copied], "cut.trk: the tractogram cannot be read"),
                        ([good, good, copied], "given twice"), ([good, tmp_path/"far.trk", copied], "far.trk cannot be scored: no line touches"),
                        ([good, copied, "--html", good, "-f"], "would replace what it is made from"), ([good, copied, "--html", copied/"C_mask.nii.gz", "-f"], "would replace what"),
                        ([good, copied, "--out", copied/TRACTOMETRY, "-f"], "would replace what"), ([good, copied, "--near_mm", "0"], "a number above 0"),
                        ([good, copied, "--out", tmp_path/"x", "--html", tmp_path/"x"], "would be one file")):
        with pytest.raises(SystemExit) as e: run_command(dwiml_score, [str(o) for o in words])
        told = str(e.value.code) + capsys.readouterr().err
        assert says in told and "Traceback" not in told
    assert not (tmp_path/"x").exists()


def test_memory_is_asked_for_before_it_is_taken(challenge, phantom, monkeypatch):
    "A file says how much it holds; a reference how many masks it has."
    files = sorted((phantom/"bundles").glob("*.trk"))
    monkeypatch.setattr(sizes, "UNASKED", 0); monkeypatch.setattr(sizes, "free_memory", lambda device="cpu": 29_000)
    with pytest.raises(DataProblem, match="no memory for the masks of a reference, 15 in all"): load_reference(challenge)
    monkeypatch.setattr(judging, "Judge", lambda *args: pytest.fail("judged"))
    monkeypatch.setattr(judging, "load_tractogram", lambda path: pytest.fail("read"))
    with pytest.raises(DataProblem, match="no memory for 60 lines of"): judging.read_to_judge(files[0])


def test_a_name_in_a_reference_leads_nowhere(phantom, tmp_path):
    "Only what the configuration names as a file is read; a bundle's name is no path."
    own = Path(shutil.copytree(phantom, tmp_path/"sub"))
    shutil.copy(own/"bundles/across.trk", tmp_path/"other.trk")
    changed(own/"truth", "scoring.json", lambda o: o["bundles"].update({"../../other": o["bundles"].pop("across")}))
    assert list(load_reference(own).lines) == ["bent"]
