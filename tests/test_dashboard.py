"""Training watched and steered: curves of what is logged, spikes that stay, another process's folder, orders through its file."""
import base64
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.runs.watch import RunLog, WatchedRun
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.generation import DWIMLTrainerOneInputWithGVPhase
from dwiml_nb.training.means import Logged
from dwiml_nb.training.sinks import LogTail, read_rows
from dwiml_nb.training.trainer import DWIMLTrainerOneInput
from dwiml_nb.viz import panel
from dwiml_nb.viz.curves import Curves, curves_of, lines_of, thinned
from dwiml_nb.widgets.training_dashboard import TrainingDashboard
from dwiml_nb.widgets.viz import viz

SCRIPT = """
import sys, time
from dwiml_nb.runs.resume import trainer_from_folder
trainer = trainer_from_folder(sys.argv[1], 'other', new_max_epochs=1000)
trainer.control.on_batch_end.append(lambda row: time.sleep(.02))
trainer.train_and_validate()
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory): return MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("study"))).load_data()


@pytest.fixture
def trainer_of(study, tmp_path):
    "A function that makes a small trainer."
    def make(name, **options):
        torch.manual_seed(0)
        model = Learn2TrackModel(study.nb_features["input"], step_size=2., rnn_layer_sizes=[4])
        return DWIMLTrainerOneInput(model, tmp_path / "runs", name, DWIMLBatchIDSampler(study, "bundles", 60, 60),
                                    DWIMLBatchLoaderOneInput(study, model, "input", "bundles"), device="cpu", **{"max_epochs": 2} | options)
    return make


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.05)


def row(phase, epoch, batch, **values): return dict(phase=phase, epoch=epoch, batch=batch, **values)


# ---- curves

def test_thinning_keeps_every_spike():
    rng = np.random.default_rng(0)
    losses = rng.random(100_003)
    spikes = rng.choice(100_003, 20, replace=False)
    losses[spikes] = np.linspace(5, 9, 20)
    losses[7] = np.nan
    kept = thinned(losses, 1000)
    assert len(kept) <= 1000 and set(spikes) <= set(kept) and (np.diff(kept) > 0).all()
    assert np.diff(kept).max() <= 2 * np.ceil(100_003 / 500), "evenly"


def test_every_value_of_a_phase_is_drawn_without_being_named():
    log = RunLog()
    for epoch in range(2):
        for batch in range(3): log.add_batch(row("training", epoch, batch, loss=1., kl=.1, seconds=1., waiting_seconds=.25, n=4))
        log.add_batch(row("validation", epoch, 0, loss=1., kl=.2, seconds=1., waiting_seconds=.1, n=4))
        log.add_batch(row("probing", epoch, 0, loss=3., overlap=.5, n=4))
        log.add_epoch({"epoch": epoch, "train_loss": 1., "valid_loss": 1., "kl": .1, "valid_kl": .2, "probing_loss": 3., "probing_overlap": .5, "is_best": not epoch,
                       "best_epoch": 0, "best_loss": 1., "nb_batches": 3, "n": 4, "seconds": 4.})
    curves = Curves({"run": log})
    assert curves.shown == ["loss", "waiting", "kl", "probing_loss", "probing_overlap"]
    assert {o.phase for o in curves_of(log) if o.value == "kl"} == {"training", "validation"}
    waiting = next(o for o in lines_of({"run": log}) if o.value == "waiting")
    assert set(waiting.y) == {25.}
    best = next(o for o in curves.lines if o.kind == "best")
    assert (best.value, best.phase, best.x.tolist(), best.y.tolist()) == ("loss", "validation", [1.], [1.])
    log.add_batch(row("training", 2, 0, loss=1., **{"<b>new</b>": 2.}))
    curves.draw()
    assert "<b>new</b>" in curves.shown and not any("<b>" in o.text for o in curves.figure.layout.annotations)


class Talks(Learn2TrackModel):
    "Tells two numbers more."
    def compute_loss(self, outputs, target_streamlines):
        loss, n = super().compute_loss(outputs, target_streamlines)
        return loss, n, {"kl": .5, "temperature": Logged(3., how="last")}


def test_values_of_a_model_and_of_a_phase(study, tmp_path):
    model = Talks(study.nb_features["input"], step_size=2., rnn_layer_sizes=[4])
    trainer = DWIMLTrainerOneInputWithGVPhase(model, tmp_path / "runs", "talks", DWIMLBatchIDSampler(study, "bundles", 60, 60), DWIMLBatchLoaderOneInput(study, model, "input", "bundles"),
                                              device="cpu", max_epochs=1, add_a_tracking_validation_phase=True, tracking_phase_nb_batches=1, tracking_phase_max_length_mm=30.)
    trainer.train_and_validate()
    board = TrainingDashboard(trainer)
    assert {"kl", "temperature", "generation_final_distance_mm", "generation_left_mask"} <= set(board.curves.switches)
    kinds = {(o.phase, o.kind) for o in board.curves.lines if o.value == "kl"}
    assert kinds == {(phase, kind) for phase in ("training", "validation") for kind in ("batch", "epoch")}
    assert {o.kind for o in board.curves.lines if o.value == "generation_final_distance_mm"} == {"batch", "epoch"}
    board.close()


def test_a_figure_is_updated_in_place():
    log = RunLog()
    curves = Curves({"run": log})
    for batch in range(3000):
        log.add_batch(row("training", batch // 1000, batch % 1000, loss=float(batch == 1234)))
        if batch % 500 == 0: curves.draw()
    curves.draw()
    figure, traces = curves.figure, curves.figure.data
    curves.smoothing, curves.log_scale = .5, True
    curves.draw()
    assert curves.figure is figure and figure.data[:len(traces)] == traces
    trace = curves.traces["run", "loss", "training", "batch"]
    assert len(trace.y) <= 1000 and max(trace.y) == 1 and trace.customdata[np.argmax(trace.y)] == [2, 235], "people count from 1"


def answer_of_a_page(sent):
    "What plotly's page answers of a line: what it holds otherwise than it was sent. It unpacks arrays, and then tells all their numbers."
    def unpacked(packed): return np.frombuffer(base64.b64decode(packed["bdata"]), packed["dtype"]).reshape([int(n) for n in packed.get("shape", "-1").split(",")])
    def numbered(values): return {str(i): v for i, v in enumerate(values.tolist())} if values.ndim == 1 else [numbered(row) for row in values]
    return {"uid": sent["uid"], "type": "scatter", "line": {"shape": "linear", "simplify": True}} | {k: numbered(unpacked(v)) for k, v in sent.items() if isinstance(v, dict) and "bdata" in v}


def test_the_answer_of_a_page_is_understood():
    "Before and after a line grows, with numbers that are not finite."
    log = RunLog()
    curves = Curves({"run": log})
    for epoch in range(3):
        for batch in range(4): log.add_batch(row("training", epoch, batch, loss=np.nan if batch == 1 else 1., kl=np.inf, seconds=1., waiting_seconds=.1))
        log.add_epoch({"epoch": epoch, "train_loss": 1., "valid_loss": np.nan, "best_epoch": 0, "best_loss": 1., "is_best": not epoch, "nb_batches": 4, "n": 4, "seconds": 4.})
        curves.draw()
        figure, sent = curves.figure, curves.figure._widget_data
        assert len(sent) > 3 and all(o["uid"] for o in sent)
        figure._handler_js2py_traceDeltas({"new": {"trace_deltas": [answer_of_a_page(o) for o in sent], "trace_edit_id": figure._last_trace_edit_id}})
        json.dumps(sent, allow_nan=False)


def test_a_clicked_point_names_its_batch(trainer_of):
    board, picked = TrainingDashboard(trainer_of("run")), []
    board.on_pick.append(lambda *batch: picked.append(batch))
    board.start()
    assert board.wait(60) == "ended"
    points = lambda *at: type("Points", (), {"point_inds": list(at)})
    for phase in ("training", "validation"):
        key = board.run_name, "loss", phase, "batch"
        board.curves.pick(key, board.curves.traces[key], points(1), None)
    second = [o for o in read_rows(board.run.folder / "logs" / "batches.jsonl") if o["phase"] == "validation"][1]
    assert picked == [("training", 0, 1), ("validation", second["epoch"], second["batch"])]
    board.close()


# ---- logs that grow

def test_a_log_is_read_once(tmp_path):
    path, tail = tmp_path / "batches.jsonl", LogTail(tmp_path / "batches.jsonl")
    path.write_text('{"batch": 0}\n{"batch"')
    assert tail.look() == ([{"batch": 0}], False) and tail.look() == ([], False) and tail.nb_read == 13
    with open(path, "a") as f: f.write(': 1}\nno row\n')
    with pytest.raises(DataProblem, match="line 3 of the log"): tail.look()


def test_a_resumed_run_is_drawn_as_it_was_in_the_end(trainer_of):
    trainer = trainer_of("run")
    run, broken = WatchedRun(trainer.experiment_folder), [True]

    def breaks(row):
        if (row["epoch"], row["phase"], row["batch"]) == (1, "training", 1) and broken: broken.clear(); raise KeyboardInterrupt
    trainer.control.on_batch_end.append(breaks)
    with pytest.raises(KeyboardInterrupt): trainer.train_and_validate()
    run.look()
    assert run.log.phases["training"]["epoch"].max() == 1 and run.state()[0] == "stopped"
    trainer.train_and_validate()
    run.look()
    rows = [o for o in read_rows(run.folder / "logs" / "batches.jsonl") if o["phase"] == "training"]
    assert run.log.phases["training"]["loss"].tolist() == [o["loss"] for o in rows] and run.state()[0] == "ended"
    assert {"waiting_seconds"} <= rows[0].keys() and all(0 <= o["waiting_seconds"] <= o["seconds"] for o in rows)


# ---- another process

def test_another_process_is_watched_steered_and_taken_up(trainer_of, tmp_path):
    trainer = trainer_of("other", max_epochs=1)
    trainer.train_and_validate()
    board = TrainingDashboard(trainer.experiment_folder)
    assert board.state == "ended" and board.start_button.disabled and not board.error
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, tmp_path / "runs"], stderr=subprocess.DEVNULL)
    try:
        until(lambda: (board.look(), board.state == "running" and board.epoch > 1)[1])
        assert board.start_button.disabled and not any(o.disabled for o in board.steering.buttons) and board.run.max_epochs == 1000 and str(process.pid) in board.told.value
        with pytest.raises(RuntimeError, match="running already"): board.start()
        board.steering.buttons[0].click()
        until(lambda: (board.look(), board.state == "paused")[1])
        assert "paused before" in board.message.value and not board.start_button.disabled
        board.steering.rate_field.value = "0.00012"
        board.steering.buttons[-1].click()
        until(lambda: (board.look(), "the learning rate is 0.00012 from" in board.message.value)[1])
        board.start_button.click()
        until(lambda: (board.look(), board.run.log.phases["training"]["learning_rate"][-1] == .00012)[1])
        second = TrainingDashboard(trainer.experiment_folder)
        assert second.state == "running" and second.epoch >= 1
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        until(lambda: (board.look(), board.state == "died")[1])
        assert "killed, or out of memory" in board.told.value and board.start_button.description == "Go on"
    finally: process.kill()
    board.steering.epochs_field.value = board.epoch + 1
    done = board.epoch
    board.start_button.click()
    assert board.wait(60) == "ended", board.error
    assert board.epoch == done + 1 and board.trainer is not None and "best epoch" in board.told.value
    board.close(), second.close()


def test_buttons_make_sense(trainer_of):
    board = TrainingDashboard(trainer_of("run", max_epochs=50))
    pressed = lambda: [o.description for o in (board.start_button, *board.steering.buttons) if not o.disabled]
    assert pressed() == ["Start"]
    steering = ["Stop after batch", "Stop after epoch", "Checkpoint now", "Set learning rate"]
    board.start()
    until(lambda: (board.draw(), pressed() == ["Pause", *steering])[1])
    board.steering.rate_field.value = "quick"
    board.steering.buttons[-1].click()
    assert "write the learning rate beside the button" in board.error
    board.order("pause")
    until(lambda: board.state == "paused")
    assert pressed() == ["Go on", *steering]
    board.steering.buttons[3].click()
    until(lambda: "a checkpoint was saved before" in board.message.value)
    board.start_button.click()
    until(lambda: board.state != "paused")
    board.steering.buttons[2].click()
    assert board.wait(30) == "stopped" and board.trainer.batch == 0 and pressed() == ["Go on"] and "stopped; its checkpoint is saved" in board.message.value
    board.close()


# ---- several

def test_runs_are_compared(trainer_of, tmp_path):
    for name, options in (("a", {}), ("b", {"max_epochs": 1})): trainer_of(name, **options).train_and_validate()
    both = viz(tmp_path / "runs")
    assert both.table.differ["trainer.max_epochs"] == {"a": 2, "b": 1} and "trainer.<wbr>max_<wbr>epochs" in both.still() and "<img" in both.still()
    assert {o.run for o in both.curves.lines} == {"a", "b"} and "trainer.max_epochs" in repr(both)
    with pytest.raises(RuntimeError, match="several"): both.start()
    one = viz(tmp_path / "runs" / "a")
    assert one.table is None and one.state == "ended" and "ended: epoch 2 of 2" in one.still()
    for board in (both, one): board.close()


def test_a_dashboard_changes_no_weight(trainer_of):
    alone, shown = trainer_of("alone"), trainer_of("shown")
    alone.train_and_validate()
    board = TrainingDashboard(shown, seconds=0.)
    board.start()
    assert board.wait(60) == "ended"
    for name, value in alone.model.state_dict().items(): assert torch.equal(value, shown.model.state_dict()[name]), name
    board.close()


def test_experiments_of_a_stranger(tmp_path):
    folder = tmp_path / "<img src=x>"
    (folder / "logs").mkdir(parents=True)
    (folder / "parameters_latest.json").write_text(json.dumps({"trainer": {"params": {"max_epochs": 3}}}))
    (folder / "logs" / "batches.jsonl").write_text('{"phase": "<script>", "epoch": 0, "batch": 0, "loss": "inf"}\n')
    (folder / "logs" / "control.jsonl").write_text('{"do": "<b>", "rate": []}\n')
    (folder / "logs" / "epochs.jsonl").write_text('{"epoch": 0, "valid_loss": 1e400, "best_epoch": 7}\n')
    board = TrainingDashboard(folder)
    assert "<img src" not in board.still().replace("<img alt", "") and "<script>" not in str(board.figure.to_dict()) and board.state == "died"
    board.close()
    (folder / "logs" / "batches.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(DataProblem, match="not one of a batch"): TrainingDashboard(folder)
    with pytest.raises(DataProblem, match="not the folder of an experiment"): TrainingDashboard(tmp_path / "none")
    os.mkdir(tmp_path / "empty")
    with pytest.raises(DataProblem, match="nor of several"): TrainingDashboard([tmp_path / "empty"])


def test_a_page_that_is_loaded_again_is_told_its_still(monkeypatch):
    log, sent = RunLog(), []
    log.add_batch(row("training", 0, 0, loss=1.))
    curves = Curves({"run": log})
    monkeypatch.setattr(panel, "update_display", lambda *args, **kwargs: None)
    monkeypatch.setattr(type(curves.message), "send", lambda self, content, buffers=None: sent.append(content))
    curves.is_shown = True
    curves.message.page = "first"
    curves.renew()
    assert not sent, "the page knows which output it is"
    curves.message.page = "again"
    curves.renewal.flush()
    assert sent[-1]["mark"] == curves.mark and f'class="{curves.mark}"' in sent[-1]["still"] and "<img" in sent[-1]["still"]
