"""Whole-brain tracking: the same lines whoever tracks which batch and when, after kills too, in files that are whole, in memory that does not grow."""
import copy
import multiprocessing
import os
import signal
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.cli.common import run_command
from dwiml_nb.cli.tracking import dwiml_track_from_model
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.lines import unit
from dwiml_nb.core.phantom import FieldReader, circling_subject
from dwiml_nb.core.space import convert
from dwiml_nb.core.tractograms import TRACTOGRAM_FORMATS, Tractogram, load_tractogram, save_pieces, save_tractogram
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.transformers import TransformerSrcOnlyModel
from dwiml_nb.runs.track import track_from_model
from dwiml_nb.study.toy import toy_study
from dwiml_nb.tracking.propagate import one_step
from dwiml_nb.tracking.seeds import SeedsInMask, seeds_from_mask
from dwiml_nb.tracking.stops import TissueMaps
from dwiml_nb.tracking.tracker import Tracker
from dwiml_nb.tracking.whole_brain import parts_folder_of, track_here
from dwiml_nb.training.trainer import DWIMLTrainerOneInput

SUFFIXES = (".trk", ".tck", ".trx")


def circles(**options):
    dataset, grid, volumes = circling_subject()
    options = {"tracking_mask_group": "ring", "max_length_mm": 60, "batch_size": 50, **options}
    return Tracker(FieldReader(), dataset, "sub-01", "field", **options), SeedsInMask(volumes["ring"], grid.affine, nt=230)


def stopping_after(n, tracked):
    "Tracks n parts, then stops as Ctrl-C does."
    def some(tracker, parts, jobs, *args):
        for job in jobs:
            if len(tracked) == n: raise KeyboardInterrupt
            track_here(tracker, parts, [job], *args)
            tracked.append(job[0])
    return some


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    dataset = MultiSubjectDataset(toy_study(folder)).load_data()
    torch.manual_seed(0)
    model = Learn2TrackModel(dataset.nb_features["input"], "gru", [8], step_size=1., nb_previous_dirs=1, dg_args=dict(axis_head=True))
    sampler, loader = DWIMLBatchIDSampler(dataset, "bundles", 40), DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles")
    trainer = DWIMLTrainerOneInput(model, folder/"experiments", "e", sampler, loader, max_epochs=1, learning_rates=[1e-2], device="cpu")
    trainer.train_and_validate()
    return trainer.experiment_folder


# ---- files

@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_streamed_file_is_the_file_of_all_lines(tmp_path, suffix):
    tracker, seeds = circles()
    once = tracker.track(seeds[:], quiet=True)
    save_tractogram(Tractogram(once.lines, once.grid), tmp_path/f"once{suffix}")
    told = tracker.track_to_file(seeds, tmp_path/f"parts{suffix}", quiet=True)
    a, b = (load_tractogram(tmp_path/f"{o}{suffix}") for o in ("once", "parts"))
    assert torch.equal(a.lines.data, b.lines.data) and torch.equal(a.lines.offsets, b.lines.offsets)
    assert (len(told), told.nb_points) == (len(once), len(once.lines.data)) == TRACTOGRAM_FORMATS[suffix](suffix).size(told.path)
    assert told.info == {k: once.info[k] for k in ("dropped", "reasons", "stop_names")}
    if suffix == ".trx": return
    assert (tmp_path/f"once{suffix}").read_bytes() == told.path.read_bytes()
    header = nib.streamlines.load(told.path, lazy_load=True).header
    assert int(header["count" if suffix == ".tck" else "nb_streamlines"]) == len(once)


def test_no_seed_and_no_line_are_whole_files(tmp_path):
    tracker, seeds = circles(min_length_mm=59.9)
    for suffix in SUFFIXES:
        outside = torch.zeros(3, 3)                                    # in the middle of the ring: no line
        assert len(tracker.track_to_file(outside, tmp_path/f"a{suffix}", quiet=True)) == 0 == len(load_tractogram(tmp_path/f"a{suffix}"))
        assert len(tracker.track_to_file(seeds[:0], tmp_path/f"b{suffix}", quiet=True)) == 0 == len(load_tractogram(tmp_path/f"b{suffix}"))
    assert not list(tmp_path.glob(".*"))


def test_a_failing_disk_leaves_the_parts_and_no_file(tmp_path, monkeypatch):
    tracker, seeds = circles()
    def full(self, pieces, grid, path, points="float32"):
        next(iter(pieces))
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(TRACTOGRAM_FORMATS[".trk"], "save_pieces", full)
        with pytest.raises(OSError, match="No space left"): tracker.track_to_file(seeds, tmp_path/"a.trk", quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == [".a.trk.parts"]
    tracked = []
    assert len(tracker.track_to_file(seeds, tmp_path/"a.trk", elsewhere=stopping_after(9, tracked), quiet=True)) > 0
    assert not tracked and [p.name for p in tmp_path.iterdir()] == ["a.trk"]


def test_float16_points_are_read_by_us(tmp_path):
    tracker, seeds = circles()
    once = tracker.track(seeds[:], quiet=True)
    tracker.track_to_file(seeds, tmp_path/"a.trx", "float16", quiet=True)
    assert "positions.3.float16" in zipfile.ZipFile(tmp_path/"a.trx").namelist()
    torch.testing.assert_close(load_tractogram(tmp_path/"a.trx").lines.data, once.lines.data.half().float(), atol=0, rtol=0)
    for suffix in (".trk", ".tck"):
        with pytest.raises(DataProblem, match="float16. To do: save a .trx"): save_pieces([], once.grid, tmp_path/f"a{suffix}", "float16")


# ---- whose parts they are

def test_parts_of_another_run_are_refused_or_replaced_when_asked(tmp_path):
    out, tracked = tmp_path/"a.trx", []
    tracker, seeds = circles()
    with pytest.raises(KeyboardInterrupt): tracker.track_to_file(seeds, out, elsewhere=stopping_after(2, tracked), quiet=True)
    other, _ = circles(theta_deg=20)
    with pytest.raises(DataProblem, match=r"Expected: theta_deg 90. Found: theta_deg 20"): other.track_to_file(seeds, out, quiet=True)
    with pytest.raises(DataProblem, match="seeds"): tracker.track_to_file(SeedsInMask(np.ones((40, 40, 4)), seeds.grid.affine, nt=230), out, quiet=True)
    again = []
    with pytest.raises(KeyboardInterrupt): other.track_to_file(seeds, out, overwrite=True, elsewhere=stopping_after(1, again), quiet=True)
    assert again == [0]
    (parts_folder_of(out)/"notes.txt").write_text("mine")
    other.track_to_file(seeds, out, quiet=True)
    assert [p.name for p in parts_folder_of(out).iterdir()] == ["notes.txt"]        # what is not the run's stays


def test_other_weights_are_another_run():
    tracker, seeds = circles()
    mark = tracker.mark()
    tracker.walk.inputs_at.volumes[0][0][0, 0, 0, 0] += 1
    assert {k for k, v in tracker.mark().items() if mark[k] != v} == {"images"}


def test_two_at_once_are_one_too_many(tmp_path):
    tracker, seeds = circles()
    def second(*args):
        with pytest.raises(DataProblem, match="another process is tracking into this file"): circles()[0].track_to_file(seeds, tmp_path/"a.trk", quiet=True)
        track_here(*args)
    assert len(tracker.track_to_file(seeds, tmp_path/"a.trk", elsewhere=second, quiet=True)) > 0


def test_a_link_in_the_place_of_the_parts_is_refused(tmp_path):
    tracker, seeds = circles()
    (tmp_path/"elsewhere").mkdir()
    parts_folder_of(tmp_path/"a.trk").symlink_to(tmp_path/"elsewhere")
    with pytest.raises(DataProblem, match="the place of the run's parts is taken"): tracker.track_to_file(seeds, tmp_path/"a.trk", quiet=True)
    assert not list((tmp_path/"elsewhere").iterdir())


# ---- masks, tissues, steps of order 4

def test_act_is_dipys():
    from dipy.tracking.stopping_criterion import ActStoppingCriterion
    g = torch.Generator().manual_seed(0)
    include, exclude = torch.rand(2, 8, 9, 7, generator=g).pow(.5)*torch.tensor([[[[1.]]], [[[.7]]]])
    points = torch.rand(3000, 3, generator=g)*torch.tensor([6., 7, 5]) + 1
    criterion = ActStoppingCriterion(include.double().numpy(), exclude.double().numpy())
    theirs = np.array([int(criterion.check_point(p)) for p in (points - .5).double().numpy()])     # voxel centres are whole numbers there
    walk = SimpleNamespace(sizes=torch.ones(3), code=["going on", "included", "ruled_out"].index)
    ours = TissueMaps(include, exclude, "act")(walk, points, torch.zeros(3000, dtype=torch.long), None)[0].numpy()
    assert np.array_equal(ours, np.select([theirs == 2, theirs == 0], [1, 2], 0)) and len(np.unique(ours)) == 3


def test_cmc_draws_belong_to_lines_and_steps():
    "The same lines in other batches, alone, and beside rules that draw nothing; directions drawn beside it are as before."
    dataset, grid, volumes = circling_subject()
    grey = torch.zeros_like(volumes["ring"])
    grey[:18] = .6
    volumes |= {"grey": grey, "csf": torch.zeros_like(grey)}
    dataset.volume_groups += ["grey", "csf"]
    dataset.nb_features = {k: v.shape[3] for k, v in volumes.items()}
    of = lambda **more: Tracker(FieldReader(), dataset, "sub-01", "field", "ring", **{"tissue_groups": ["grey", "csf"], **more})
    seeds = seeds_from_mask(volumes["half"], grid.affine, nt=60)
    whole, parts = of().track(seeds, quiet=True), of(batch_size=13).track(seeds, quiet=True)
    assert torch.equal(whole.lines.data, parts.lines.data) and 10 < len(whole) and whole.info["stop_names"][6:] == ("included", "ruled_out")
    assert set(whole.info["stop_reasons"].flatten().tolist()) == {6} and whole.info["dropped"]
    assert torch.equal(Tracker(FieldReader(), dataset, "sub-01", "field", "ring", stop_rules=(), tissue_groups=["grey", "csf"], seed=1234).track(seeds, quiet=True).lines.data, whole.lines.data)
    assert not torch.equal(of(seed=5).track(seeds, quiet=True).lines.data, whole.lines.data)
    with pytest.raises(ValueError, match="tissue_groups are two maps"): of(tissue_groups=["grey"])
    with pytest.raises(ValueError, match="'cmc' or 'act'"): of(tissue_rule="both")
    with pytest.raises(ValueError, match="tissue_groups are two maps, for tissue_rule='act'.*found None"): of(tissue_rule="act", tissue_groups=None)
    cut = of(tissue_groups=None, exclude_groups=["ring"]).track(seeds, quiet=True).info["dropped"]
    assert set(cut) == {"entered an exclusion mask"}


def test_rk4_leaves_the_state_of_a_step(experiment):
    "A Transformer with a window: the four places are asked as from states of their own, and the step's state is that of the first."
    dataset = MultiSubjectDataset(experiment.parents[1]/"study.hdf5", lazy=True).load_data()
    torch.manual_seed(0)
    model = TransformerSrcOnlyModel(dataset.nb_features["input"], max_len=40, window=2, nheads=2, ffnn_hidden_size=8, n_layers_e=1, input_embedded_size=8, step_size=1.).eval()
    walk = Tracker(model, dataset, "sub-04", "input", "wm_mask", integration="rk4", max_length_mm=30, theta_deg=180).walk
    seeds = seeds_from_mask(dataset.testing.get_volume(0, "seed_mask"), dataset.testing.grid(0, "seed_mask").affine, nt=20)
    here, memory, state = convert(seeds, walk.grid, "rasmm", "voxmm"), torch.zeros(20, 1, 3), None
    with torch.inference_mode():
        for t in range(6):
            own, ahead, steps = [copy.deepcopy(state) for _ in range(5)], here, []
            for i, share in enumerate((.5, .5, 1, 0)):
                steps.append(unit(walk.dirs_at(ahead, memory, own[i])[0]))
                ahead = here + share*steps[-1]
            expected = here + (steps[0] + 2*steps[1] + 2*steps[2] + steps[3])/6
            after = walk.dirs_at(here, memory, own[4])[1]
            new, memory, state, *_ = one_step(walk, here, memory, state, torch.arange(20), t)
            torch.testing.assert_close(new, expected, atol=1e-6, rtol=0)
            torch.testing.assert_close(*(walk.dirs_at(new, memory, copy.deepcopy(o))[0] for o in (state, after)), atol=0, rtol=0)
            here = new


def test_rk4_asks_ahead_with_copies():
    "A model may write into its state: it has seen one point more after each step, not four."
    class Counts(FieldReader):
        def tracking_step(self, inputs, previous_dirs, state=None):
            seen = torch.zeros(len(inputs)) if state is None else state
            seen += 1
            return super().tracking_step(inputs, previous_dirs)[0], seen
        def select_state(self, state, keep): return state[keep]
        def warm_up(self, inputs, lines): return lines.lengths.float()
    dataset, grid, volumes = circling_subject()
    walk = Tracker(Counts(), dataset, "sub-01", "field", "ring", integration="rk4").walk
    here, memory, state = torch.tensor([[60., 40, 6]]), torch.zeros(1, 1, 3), None
    for t in range(4): here, memory, state, *_ = one_step(walk, here, memory, state, torch.arange(1), t)
    assert state.tolist() == [4]


def test_rk4_and_masks_by_the_command(experiment, tmp_path):
    words = [str(experiment), "sub-04", "a.trk", "seed_mask", "--nt", "80", "--device", "cpu", "--min_length", "2", "--tracking_mask_group", "wm_mask"]
    def lines(name, *more):
        run_command(dwiml_track_from_model, [*words[:2], str(tmp_path/name), *words[3:], *more])
        return load_tractogram(tmp_path/name)
    euler, rk4 = lines("a.trk"), lines("b.trk", "--integration", "rk4")
    assert len(rk4) > 10 and not np.array_equal(euler.lines.data, rk4.lines.data)
    assert len(lines("c.trk", "--include_groups", "wm_mask", "seed_mask")) == len(euler) and len(lines("d.trk", "--exclude_groups", "seed_mask")) == 0
    with pytest.raises(SystemExit, match="a tissue map holds probabilities|a tissue map cannot be"): lines("e.trk", "--tissue_groups", "input", "wm_mask")


# ---- from an experiment: processes, kills

OPTIONS = dict(nt=300, tracking_mask_group="wm_mask", theta_deg=180, min_length_mm=2, batch_size=40, algo="det", device="cpu", save_seeds=True, save_reasons=True)


def die_after(experiment, out, n):
    "Track, and SIGKILL this process once n parts are there."
    torch.set_num_threads(1)
    write = track_from_model.__globals__["TrackedParts"].write
    def write_and_die(parts, *args):
        write(parts, *args)
        if len(list(parts.folder.glob("*.npz"))) == n: os.kill(os.getpid(), signal.SIGKILL)
    track_from_model.__globals__["TrackedParts"].write = write_and_die
    track_from_model(experiment, "sub-04", out, "seed_mask", in_memory=False, **OPTIONS)


def test_kills_and_processes_change_no_byte(experiment, tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=die_after, args=(experiment, tmp_path/"killed.trk", 3))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and not (tmp_path/"killed.trk").exists()
    parts = parts_folder_of(tmp_path/"killed.trk")
    before = {p.name: p.stat().st_mtime_ns for p in parts.glob("*.npz")}
    assert len(before) == 3
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = track_from_model(experiment, "sub-04", tmp_path/"whole.trk", "seed_mask", **OPTIONS)
        told = track_from_model(experiment, "sub-04", tmp_path/"killed.trk", "seed_mask", in_memory=False, processes=2, **OPTIONS)
    finally: torch.set_num_threads(threads)
    assert (tmp_path/"killed.trk").read_bytes() == (tmp_path/"whole.trk").read_bytes() and len(told) == len(whole) > 100
    assert told.info == {k: whole.info[k] for k in ("dropped", "reasons", "stop_names")} and not parts.exists()
    by_name = load_tractogram(tmp_path/"whole.trk").dps
    assert sum(v.sum() for k, v in by_name.items() if k.startswith("stop_")) == 2*len(whole)


def test_a_run_goes_on_with_the_batch_size_and_threads_it_had(experiment, tmp_path, monkeypatch):
    options = {k: v for k, v in OPTIONS.items() if k != "batch_size"}
    from dwiml_nb.runs import track
    monkeypatch.setattr(track, "track_here", stopping_after(2, []))
    with pytest.raises(KeyboardInterrupt): track_from_model(experiment, "sub-04", tmp_path/"a.trk", "seed_mask", batch_size=70, **options)
    monkeypatch.undo()
    threads = torch.get_num_threads()
    lines = track_from_model(experiment, "sub-04", tmp_path/"a.trk", "seed_mask", **options)
    assert torch.equal(lines.lines.data, track_from_model(experiment, "sub-04", tmp_path/"b.trk", "seed_mask", batch_size=70, **options).lines.data)
    assert torch.get_num_threads() == threads


def test_the_command_streams(experiment, tmp_path, capsys):
    words = [str(experiment), "sub-04", str(tmp_path/"a.trx"), "seed_mask", "--nt", "60", "--device", "cpu", "--min_length", "2", "--batch_size", "25", "--points", "float16"]
    run_command(dwiml_track_from_model, words)
    assert f"{len(load_tractogram(tmp_path/'a.trx'))} streamlines in" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="float16. To do: save a .trx"): run_command(dwiml_track_from_model, [*words[:2], str(tmp_path/"a.trk"), *words[3:]])


# ---- memory

def anonymous_mb():
    return next(int(line.split()[1])/1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))


def memory_of(n, folder, queue):
    torch.set_num_threads(1)
    tracker, _ = circles(batch_size=500, max_length_mm=100)
    dataset, grid, volumes = circling_subject()
    most = []
    def watched(tracker, parts, jobs, *args):
        for job in jobs:
            track_here(tracker, parts, [job], *args)
            most.append(anonymous_mb())
    tracker.track_to_file(SeedsInMask(volumes["ring"], grid.affine, nt=n), Path(folder)/"a.trx", elsewhere=watched, quiet=True)
    queue.put((max(most[:3]), max(*most, anonymous_mb())))


def test_memory_does_not_grow_with_the_seeds(tmp_path):
    "20,000 lines of 100 points are 24 MB: some 8 of a thread, its caches and one batch may be there."
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=memory_of, args=(20_000, str(tmp_path), queue))
    process.start()
    first, most = queue.get(timeout=300)
    process.join(60)
    assert most - first < 12, (first, most)
