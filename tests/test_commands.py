"""Every command, every option, every piece of nonsense: one sentence and a status, never a traceback."""
import configparser
import importlib
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.cli.common import anno_parser, call_parse, run_command
from dwiml_nb.core.errors import DataProblem, printable
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.transformers import TransformerSrcOnlyModel
from dwiml_nb.study.bids import bids_phantom
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.loggers import kept_name
from dwiml_nb.training.trainer import DWIMLTrainerOneInput

ROOT = Path(__file__).resolve().parent.parent
settings = configparser.ConfigParser()
settings.read(ROOT / "settings.ini")
COMMANDS = dict(line.split("=") for line in settings["DEFAULT"]["console_scripts"].split())


def command(name):
    module, _, function = COMMANDS[name].partition(":")
    return getattr(importlib.import_module(module), function)


class Reached(BaseException):
    "The work itself would begin."


class Waits(BaseException):
    "For a pipe that nobody writes, say; nothing that catches exceptions may hide it."


# what takes long, in the module that calls it
WORK = ["study.create.write_study", "study.grow.finished_parts", "study.grow.copy_object", "study.check_apart.subprocess.run", "core.sh.fit_attenuation", "viz.plots.draw_graph", "models.checks.run_checks",
        "tracking.tracker.Tracker.track", "training.trainer.DWIMLTrainer.train_and_validate", "cli.fronts.run_parts", "demo.run.demo_study", "runs.export.write_onnx", "cli.logs.open_comet", "widgets.report.report_parts", "cli.attention.line_attention", "cli.noise.noisy_lines"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A toy study, an experiment, BIDS derivatives, and files that are none of these."
    folder = tmp_path_factory.mktemp("commands")
    study = toy_study(folder)
    dataset = MultiSubjectDataset(study).load_data()
    model = Learn2TrackModel(nb_features=dataset.nb_features["input"], rnn_key="gru", rnn_layer_sizes=[4], step_size=2.0)
    DWIMLTrainerOneInput(model, folder / "experiments", "first", DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=30), DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles"),
                         max_epochs=1, max_batches_per_epoch_training=1, max_batches_per_epoch_validation=1, device="cpu").train_and_validate()
    tts = TransformerSrcOnlyModel(dataset.nb_features["input"], input_embedded_size=4, nheads=2, n_layers_e=1, max_len=60, step_size=2.0)
    DWIMLTrainerOneInput(tts, folder / "experiments", "tts", DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=30), DWIMLBatchLoaderOneInput(dataset, tts, "input", "bundles"),
                         max_epochs=1, max_batches_per_epoch_training=1, max_batches_per_epoch_validation=1, device="cpu").train_and_validate()
    kept_name(folder / "experiments" / "first", "comet", "0" * 32)                                # as if it had a record there
    (folder / "run.toml").write_text("[data]\nhdf5_file = 'study.hdf5'\ninput_group_name = 'input'\nstreamline_group_name = 'bundles'\n[training]\nexperiment_name = 'run'\ndevice = 'cpu'\n[model]\nstep_size = 2.0\n")
    bids_phantom(folder / "bids", n_subjects=3)
    shutil.copytree(folder / "subjects" / "sub-01", folder / "subjects" / "sub-09")
    (folder / "new.txt").write_text("sub-09")
    np.save(folder / "matrix.npy", np.eye(4, dtype=int))
    nonsense = folder / "nonsense"
    (nonsense / "folder").mkdir(parents=True)
    for name, text in {"words.txt": "a b c", "list.json": "[1]", "deep.json": "[" * 100_000, "binary.trk": "\x00\x01" * 900}.items(): (nonsense / name).write_text(text)
    with h5py.File(nonsense / "other.hdf5", "w") as f: f["x"] = 1
    np.save(nonsense / "none.npy", np.zeros((0, 3)))
    return folder


def usual(here):
    "Words that each command does its work with."
    study, subjects, experiment, out = here / "study.hdf5", here / "subjects", here / "experiments" / "first", here / "out"
    lists = [subjects / f"{s}.txt" for s in ("training", "validation", "testing")]
    dwi = [subjects / "sub-01" / "dwi" / f"dwi.{kind}" for kind in ("nii.gz", "bval", "bvec")]
    brain, bundle = subjects / "sub-01" / "masks" / "brain.nii.gz", sorted((subjects / "sub-01" / "bundles").glob("*.trk"))[0]
    return {"dwiml_create_hdf5_dataset": [subjects, out / "new.hdf5", subjects / "config.json", *lists],
            "dwiml_hdf5_add_subjects": [study, subjects, "--training", here / "new.txt"],
            "dwiml_hdf5_repack": [study, "--out", out / "one.hdf5", "-f"],
            "dwiml_hdf5_describe": [study],
            "dwiml_hdf5_check": [study],
            "dwiml_hdf5_extract_data": [study, "sub-01", "bundles", out / "a.trk", "-f"],
            "dwiml_bids_sources": [here / "bids" / "derivatives" / "tracking", out / "choice", "--volume", "input:model=csd,param=fod,frame=image", "--split", "split"],
            "dwiml_fit_sh": [*dwi, subjects / "sub-01" / "masks" / "brain.nii.gz", out / "sh.nii.gz", "--order", "4"],
            "dwiml_train": [here / "run.toml", "training.experiment_name=again"],
            "dwiml_train_l2t": [out, "l2t", study, "input", "bundles"],
            "dwiml_train_transformer": [out, "tt", study, "input", "bundles"],
            "dwiml_train_autoencoder": [out, "ae", study, "bundles"],
            "dwiml_runs": [here / "experiments"],
            "dwiml_config": ["show", here / "run.toml"],
            "dwiml_resume_training_from_checkpoint": [here / "experiments", "first", "--new_max_epochs", "2", "--device", "cpu"],
            "dwiml_visualize_logs": [experiment, "--save_figures", out / "figure"],
            "dwiml_visualize_logs_correlation": [experiment, "train_loss", "valid_loss", "--save_figure", out / "correlation.png"],
            "dwiml_send_value_to_comet_from_log": [here / "experiments", "first", "--logs", "train_loss"],
            "dwiml_send_value_to_comet_manually": [here / "experiments", "first", "dice", "1", "0.5"],
            "dwiml_track_from_model": [experiment, "sub-04", out / "a.trk", "seed_mask", "-f", "--device", "cpu"],
            "dwiml_score": [sorted((subjects / "sub-04" / "bundles").glob("*.trk"))[0], subjects / "sub-04"],
            "dwiml_visualize_loss": [experiment, "sub-04", "--device", "cpu", "-f"],
            "dwiml_visualize_weights": [here / "experiments" / "tts", "sub-04", "--device", "cpu", "--color_x_y_summary", "-f"],
            "dwiml_visualize_noise_on_streamlines": [study, "sub-01", "bundles", out / "noisy.trk", "--noise_gaussian_size_forward", "0.1", "-f"],
            "dwiml_report": [experiment, "--out", out / "page.html", "-f"],
            "dwiml_check_model": ["dwiml_nb.models.learn2track:Learn2TrackModel", "--args", '{"nb_features": 5}'],
            "dwiml_compute_connectivity_matrix_from_blocs": [brain, bundle, out / "blocs.npy", "4", "4", "1", "-f"],
            "dwiml_compute_connectivity_matrix_from_labels": [brain, bundle, out / "labels.npy", "-f"],
            "dwiml_compute_connectivity_score": [here / "matrix.npy", here / "matrix.npy"],
            "dwiml_divide_volume_into_blocs": [brain, out / "where.nii.gz", "4", "-f"],
            "dwiml_sweep": [here / "run.toml", "training.experiment_name=swept", "sweep.space.model.dropout=[0.0, 0.1]"],
            "dwiml_export": [experiment, out / "a.onnx", "-f"],
            "dwiml_demo": ["--out", out / "demo", "--device", "cpu"]}


def nonsense(here):
    "Words; a pipe stands for all devices: no test may name one of the system's."
    bad = here / "nonsense"
    return ["nan", "inf", "-1", "0", "9" * 30, "", "nobody", "\x1b[2J\u202e", "x" * 5000, bad / "folder", bad / "words.txt", bad / "list.json", bad / "deep.json", bad / "binary.trk",
            bad / "other.hdf5", bad / "none.npy", bad / "pipe"]


def cases(name, words, values):
    "The usual words, with one of them, or the value of one option, replaced by each of the values."
    parser = anno_parser(command(name))
    places = [a for a in parser._actions if not a.option_strings]
    for i, place in enumerate(places):
        for v in values: yield place.dest, [*words[:i], v, *words[i + 1:]]
    for option in parser._actions:
        if option.option_strings and option.nargs != 0 and option.dest != "help":
            times = option.nargs if isinstance(option.nargs, int) else 1
            for v in values: yield option.dest, [*words, option.option_strings[-1], *[v] * times]


@pytest.fixture
def no_work(here, monkeypatch):
    (here / "out" / "deeper").mkdir(exist_ok=True, parents=True)
    monkeypatch.chdir(here / "out" / "deeper")
    def reached(*args, **kwargs): raise Reached
    monkeypatch.setattr("dwiml_nb.cli.connectivity.figure_png", lambda figure: b"a picture")          # drawn again and again
    for place in WORK:
        parts = place.split(".")
        module = importlib.import_module(".".join(["dwiml_nb", *parts[:2]]))
        owner = getattr(module, parts[2]) if len(parts) > 3 else module
        if parts[-2:] == ["subprocess", "run"]: monkeypatch.setattr(module, "subprocess", type("S", (), {"run": staticmethod(reached), "TimeoutExpired": subprocess.TimeoutExpired}))
        else: monkeypatch.setattr(owner, parts[-1], reached)


def outcome(name, words, capsys):
    "'done', 'reached', or the sentence; and the status."
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(Waits("30 s")))
    signal.alarm(30)
    try:
        with warnings.catch_warnings(): run_command(command(name), [str(w) for w in words])
        status = 0
    except Reached: status = 0
    except SystemExit as e: status = e.code or 0
    finally: signal.alarm(0)
    told = capsys.readouterr()
    text = told.out + told.err + (status if isinstance(status, str) else "")
    return (1 if isinstance(status, str) else status), text


def test_every_command_is_tried(here): assert set(usual(here)) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_usual_words_reach_the_work(name, here, no_work, capsys):
    status, text = outcome(name, usual(here)[name], capsys)
    assert status == 0, text


@pytest.mark.parametrize("name", COMMANDS)
def test_nonsense_is_a_sentence(name, here, no_work, capsys):
    bad = []
    pipe = here / "nonsense" / "pipe"
    for option, words in cases(name, usual(here)[name], nonsense(here)):
        if not pipe.is_fifo(): pipe.unlink(missing_ok=True); os.mkfifo(pipe)
        word = str(words[-1] if option.startswith("-") else next((w for w, u in zip(words, usual(here)[name]) if w != u), words[-1]))[-40:]
        try: status, text = outcome(name, words, capsys)
        except BaseException as e: bad.append(f"{option} {word!r}: {type(e).__name__}: {str(e)[:100]}"); continue
        if status not in (0, 1, 2) or "Traceback" in text or "fault of dwiml_nb" in text or status and not text.strip(): bad.append(f"{option} {word!r}: {status} {text.strip()[-200:]}")
        elif printable(text) != text: bad.append(f"{option} {word!r}: the terminal would obey {text!r:.100}")
        elif len(text) > 15_000: bad.append(f"{option} {word!r}: {len(text)} characters")
    assert not bad, "\n".join([f"{len(bad)} of them", *bad])


# ---- the nets

@call_parse
def dwiml_example(what: str):
    "Ends in some way."
    if what == "fault": {}["missing"]
    if what == "memory": bytearray(1 << 62)
    if what == "stop": raise KeyboardInterrupt("nothing was written")
    if what == "told": raise DataProblem("a name", found="\x1b[2J")
    if what == "pipe": raise BrokenPipeError
    print("a\x1b[2Jb")
    warnings.warn("odd \x07")


def test_how_a_command_ends(capsys, monkeypatch):
    for what, status, says in (("fault", 1, "DWIML_DEBUG=1"), ("memory", 1, "not enough memory"), ("stop", 130, "nothing was written"), ("told", 1, r"a name. Found: \x1b[2J."), ("fine", 0, r"a\x1b[2Jb"), ("fine", 0, r"Warning: odd \x07")):
        try: run_command(dwiml_example, [what]); code = 0
        except SystemExit as e: code = e.code
        told = capsys.readouterr()
        assert (1 if isinstance(code, str) else code) == status and says in told.out + told.err + str(code)
    monkeypatch.setenv("DWIML_DEBUG", "1")
    with pytest.raises(KeyError): run_command(dwiml_example, ["fault"])


def test_a_reader_that_has_gone(here):
    "`dwiml_hdf5_describe study.hdf5 | head -0` is no error to speak of."
    command = f"{sys.executable} -c 'import sys; sys.argv = [\"x\", sys.argv[1]]; from dwiml_nb.cli.study import *; from dwiml_nb.cli.common import run_command; run_command(dwiml_hdf5_describe)' {here / 'study.hdf5'} | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr
