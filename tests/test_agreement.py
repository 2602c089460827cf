"""Lines and the directions under them: a mirrored gradient table is found by its name, and a study in order is left alone."""
import json

import h5py
import numpy as np
import pytest

from dwiml_nb.core.agreement import TURNS, agreement, main_axes, mirror_words
from dwiml_nb.core.phantom import grid_around, simulate_subject, true_fodf, tube, write_study_files, write_subject
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.core.space import save_volume
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.study.check import check_share, check_study
from dwiml_nb.study.create import create_study
from dwiml_nb.study.lists import SUBSETS
from dwiml_nb.study.toy import toy_study
from dwiml_nb.widgets.study_browser import StudyBrowser

PEOPLE = [f"sub-{i:02d}" for i in range(1, 11)]
FAULTS = {"sub-02": TURNS["x is turned"], "sub-04": TURNS["y is turned"], "sub-06": TURNS["z is turned"], "sub-08": TURNS["x and y are swapped"]}


def oblique(seed):
    "Two bundles that no mirror leaves as they are."
    rng = np.random.default_rng(seed)
    shapes = [[-12, -8, -7], [0, 1, 0], [12, 8, 7]], [[-9, 11, -6], [-2, 3, 1], [1, -4, 3], [2, -12, 8]]
    return {name: tube(np.array(points) + rng.uniform(-.5, .5, np.shape(points)), 2.5, 40, seed) for name, points in zip("ab", shapes)}


def someone(number, bundles=None, turn=None):
    bundles = bundles or oblique(number)
    subject = simulate_subject(bundles, grid_around(Ragged.cat(list(bundles.values())), 2.5, 5.), ((0, 1), (2000, 28)), order=4, nb_sub=2, seed=number)
    if turn is not None: subject.bvecs = subject.bvecs @ turn
    return subject


def make(folder, subjects, more=None):
    "A study of simulated people, their DWI and a colour map among its groups; `more` changes its config."
    for name, s in subjects.items():
        write_subject(folder / name, s)
        save_volume(s.dwi[..., 1:16], s.grid, folder / name / "dwi/some.nii.gz")
        save_volume(np.abs(s.directions).max(0), s.grid, folder / name / "dwi/colours.nii.gz")
        save_volume(true_fodf(s.fractions, s.directions, 6), s.grid, folder / name / "dwi/fodf.nii.gz")
    people = list(subjects)
    write_study_files(folder, people[:-2] or people, people[-2:-1] if len(people) > 2 else [], people[-1:] if len(people) > 2 else [], peaks=True)
    config = json.loads((folder / "config.json").read_text())
    for name in ("some", "colours", "fodf"): config[name] = {"type": "volume", "files": [f"dwi/{name}.nii.gz"], "standardization": "none"}
    config["standardised"] = config["some"] | {"standardization": "all"}
    for change in more or (): change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return create_study(folder, folder / "study.hdf5", folder / "config.json", *(folder / f"{s}.txt" for s in SUBSETS)).path


@pytest.fixture(scope="module")
def right(tmp_path_factory): return make(tmp_path_factory.mktemp("right"), {name: someone(i) for i, name in enumerate(PEOPLE[:3])})


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    subjects = {name: someone(i, turn=FAULTS.get(name)) for i, name in enumerate(PEOPLE)}
    return make(tmp_path_factory.mktemp("wrong"), subjects)


def told(report): return {(p.subject, p.group): p for p in report.problems}


def test_a_study_in_order_has_no_finding(right):
    report = check_study(right)
    assert report.ok and not report.remarks, report
    assert set(report.agreement) == {"input", "peaks", "fodf"}, "neither masks, nor the signal, nor colours"
    assert all(.85 < value < 1 for found in report.agreement.values() for value in found.values()), report


def test_each_turn_is_found_by_its_name(wrong):
    report = check_study(wrong)
    said = {s: {p.problem for (who, _), p in told(report).items() if who == s} for s in PEOPLE}
    assert said == {s: set() for s in PEOPLE} | {"sub-02": {"the gradients look mirrored in x"}, "sub-04": {"the gradients look mirrored in y"},
                                                 "sub-06": {"the gradients look mirrored in z"}, "sub-08": {"the gradients look as if x and y were swapped"}}
    assert {g for _, g in told(report)} == {"input", "peaks"}, "the true fODFs are right"
    assert "if x is turned" in told(report)["sub-02", "input"].found and "dwiml_fit_sh" in told(report)["sub-02", "input"].do


def test_shares_and_the_browser_say_the_same(wrong, tmp_path):
    whole = check_study(wrong).as_dict()
    for i in (1, 2): (tmp_path / f"{i}.json").write_text(json.dumps(check_share(wrong, f"{i}/2")))
    joined = check_study(wrong, kept=[tmp_path / "1.json", tmp_path / "2.json"]).as_dict()
    assert whole | {"seconds": 0} == joined | {"seconds": 0}
    browser = StudyBrowser(MultiSubjectDataset(wrong).load_data())
    browser.facts.ask_all()
    assert browser.facts.wait()
    cell = lambda row, title: browser.table.rows[row][browser.table.place(title)]
    for i, s in enumerate(PEOPLE):
        assert cell(i, "agreement") == pytest.approx(min(found[s] for found in whole["agreement"].values())), s
        assert ("gradients look" in cell(i, "problems")) == (s in FAULTS)
    browser.close()


def test_what_no_turn_mends_is_unlike_the_others(tmp_path):
    tilt = np.deg2rad(50)
    about = np.array([[np.cos(tilt), 0, np.sin(tilt)], [0, 1, 0], [-np.sin(tilt), 0, np.cos(tilt)]])
    study = make(tmp_path, {name: someone(i, turn=about if i == 3 else None) for i, name in enumerate(PEOPLE)})
    report = check_study(study)
    assert report.ok and {(p.subject, p.group) for p in report.remarks} == {("sub-04", "input"), ("sub-04", "peaks")}, report
    browser = StudyBrowser(MultiSubjectDataset(study).load_data())
    browser.facts.ask_all()
    assert browser.facts.wait()
    assert list(browser.facts.odd) == ["sub-04"] and all("agreement 0." in said for said in browser.facts.odd["sub-04"])
    browser.close()


def test_directions_are_known_without_a_frame(tmp_path):
    "Studies by dwi_ml say none."
    def frameless(config): del config["input"]["frame"], config["peaks"]["frame"]
    report = check_study(make(tmp_path, {"sub-01": someone(1, turn=FAULTS["sub-04"])}, [frameless]))
    assert {key: p.problem for key, p in told(report).items()} == dict.fromkeys([("sub-01", "input"), ("sub-01", "peaks")], "the gradients look mirrored in y")


@pytest.mark.parametrize("way", [[1, 0, 0], [1, 1, 0], [1, -.7, .5]])
def test_lines_that_all_run_one_way_prove_nothing(tmp_path, way):
    bundle = {"one": tube(np.outer([-12, 0, 12], way), 3., 60, 0)}
    report = check_study(make(tmp_path, {"sub-01": someone(0, bundle), "sub-02": someone(1, bundle, TURNS["x is turned"])}))
    assert report.ok and not report.remarks, report


def test_studies_without_lines_or_directions(tmp_path):
    study = toy_study(tmp_path)
    def without(name, change):
        path = tmp_path / name
        path.write_bytes(study.read_bytes())
        with h5py.File(path, "r+") as file:
            for attr in [a for a in file.attrs if "headers" in a]: del file.attrs[attr]
            for s in file: change(file[s])
        return check_study(path)
    def empty(subject):
        for key in ("data", "offsets", "lengths", "euclidean_lengths"):
            dtype, shape = subject["bundles"][key].dtype, subject["bundles"][key].shape
            del subject["bundles"][key]
            subject["bundles"].create_dataset(key, (0, *shape[1:]), dtype)
    for name, change in (("lines", lambda s: s.__delitem__("bundles")), ("input", lambda s: s.__delitem__("input")), ("empty", empty)):
        report = without(f"{name}.hdf5", change)
        assert report.ok and not report.agreement, report
    damaged = without("damaged.hdf5", lambda s: s["bundles/offsets"].__setitem__(3, 10**9))
    assert {p.problem for p in damaged.problems} == {"offsets or lengths point outside the data"} and not damaged.agreement


def test_what_may_be_directions():
    rng = np.random.default_rng(0)
    unit = rng.normal(size=(400, 3))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    assert main_axes(np.abs(unit)) == main_axes(unit[:, :2]) == main_axes(np.ones((9, 15))) == []
    long = np.stack([.3 * unit, .9 * unit[::-1]], 1)
    long[::7, 0] = 0  # two peaks, in six numbers; not SH of order 2
    axes, = main_axes(long.reshape(400, 6))
    assert np.allclose(axes, unit[::-1])
    for name, turn in TURNS.items():
        found = agreement(unit @ turn, unit)
        assert found.best == name and (mirror_words(found) is None) == (name == "as it is")
    assert agreement(unit[:40], unit[:40]) is None, "too few points"
    loose = unit * [-1, 1, 1] + rng.normal(size=unit.shape) * .65  # some SH-sized thing else comes as close in one of seven ways
    loose /= np.linalg.norm(loose, axis=1, keepdims=True)
    assert [mirror_words(agreement(loose, unit, is_named=named)) is None for named in (True, False)] == [False, True]
    assert mirror_words(agreement(rng.permutation(unit), unit)) is None


def test_an_image_that_was_never_scaled_is_told(tmp_path):
    study = toy_study(tmp_path, n_subjects=9)
    with h5py.File(study, "r+") as file: file["sub-05/input/data"][()] *= 40
    report = check_study(study)
    assert report.ok and [(p.subject, p.group, p.found) for p in report.remarks] == [("sub-05", "input", report.remarks[0].found)]
    assert "another scale" in report.remarks[0].problem and 35 < float(report.remarks[0].found.split()[0]) < 45
    browser = StudyBrowser(MultiSubjectDataset(study).load_data())
    browser.facts.ask_all()
    assert browser.facts.wait()
    assert list(browser.facts.odd) == ["sub-05"] and "times as large as usual" in browser.facts.odd["sub-05"][0]
    browser.close()
