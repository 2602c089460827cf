"""Loggers: the numbers of a run in TensorBoard, MLflow, Comet and CSV, each read by its own reader; kills, slow and failing loggers, servers named by files."""
import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.core.options import need_extra
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.loggers import Book, Logger, archived, archives, kept_name, own_store, plain_name, rows_before, send_logs
from dwiml_nb.training.sinks import SINKS, read_logs, sink_of
from dwiml_nb.training.trainer import DWIMLTrainerOneInput

KEYS = ["csv", "tensorboard", "mlflow", "comet"]
OWN = [dict(key=key, wait=300, every=0.05) for key in KEYS]


class Telling(Learn2TrackModel):
    "A value of its own, with a name that no logger takes as it is."
    def compute_loss(self, outputs, target_streamlines, **kwargs):
        loss, n = super().compute_loss(outputs, target_streamlines, **kwargs)
        return loss, n, {"length <mm>": outputs.data.norm(dim=1).mean()}


@pytest.fixture(scope="module")
def study(tmp_path_factory): return toy_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def dataset(study): return MultiSubjectDataset(study).load_data()


def make(dataset, folder, name="run", sinks=OWN, epochs=2):
    torch.manual_seed(0)
    model = Telling(dataset.nb_features["input"], rnn_key="gru", rnn_layer_sizes=[4], step_size=2.0)
    sampler = DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=40, batch_size_validation=40)
    loader = DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles")
    return DWIMLTrainerOneInput(model, folder, name, sampler, loader, max_epochs=epochs, max_batches_per_epoch_training=4,
                                max_batches_per_epoch_validation=2, device="cpu", sinks=sinks)


def a_picture(colour):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), colour, "u1")).save(file, "png")
    return file.getvalue()


def with_pictures(trainer):
    trainer.control.on_epoch_end.append(lambda row: trainer.sinks.send("picture", "lines", a_picture(50 + row["epoch"]), row["epoch"]))
    return trainer


def in_csv(folder):
    found = []
    for file in (folder / "csv").glob("*.csv"):
        if file.name == "parameters.csv": continue
        group = "epoch" if file.stem == "epochs" else file.stem.removeprefix("batches_")
        for row in csv.DictReader(file.open()):
            found += [(group, name, int(row["step"]), float(value)) for name, value in row.items() if name != "step" and value]
    return found


def in_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = []
    for group in (folder / "tensorboard").iterdir():
        events = EventAccumulator(str(group), size_guidance={"scalars": 0}).Reload()
        found += [(group.name, tag.partition("/")[2], e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    return found


def in_mlflow(folder):
    client = need_extra("mlflow.tracking", "mlflow").MlflowClient(own_store(folder.parent))
    run = kept_name(folder, "mlflow")
    names = client.get_run(run).data.metrics
    return [(*name.split("/", 1), m.step, m.value) for name in names for m in client.get_metric_history(run, name)]


def in_comet(folder):
    metrics = [o["payload"]["metric"] for o in archived(folder) if o["type"] == "metric_msg"]
    return [(*m["metricName"].split("/", 1), m["step"], m["metricValue"]) for m in metrics if "/" in m["metricName"]]


READERS = dict(csv=in_csv, tensorboard=in_tensorboard, mlflow=in_mlflow, comet=in_comet)
TIMES = ("seconds", "points_per_second", "waiting_seconds")


def check_same_numbers(folder, key):
    "What the logger's own reader finds is what the experiment's logs hold: each once, with its value."
    wanted = {o[:3]: o[3] for o in rows_before(folder, (10**9, 0, 0))}
    found = READERS[key](folder)
    assert Counter(o[:3] for o in found) == Counter(wanted.keys()), key
    for group, name, step, value in found:
        if name in TIMES: continue                # of a batch that was done twice, a logger may keep the first
        one = np.float32(wanted[group, name, step]) if key == "tensorboard" else wanted[group, name, step]
        assert value == one, (key, group, name, step)
    return found


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments")
    calls, real = [], socket.socket.connect
    def connect(self, address):
        calls.append(address)
        raise OSError("no call leaves this machine")
    socket.socket.connect = connect
    hook = sys.excepthook
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*lost")
            with_pictures(make(dataset, folder)).train_and_validate()
    finally: socket.socket.connect = real
    assert not calls and sys.excepthook is hook
    return folder / "run"


@pytest.mark.parametrize("key", KEYS)
def test_the_same_numbers_everywhere(trained, key):
    found = check_same_numbers(trained, key)
    groups = Counter(group for group, name, *_ in found if name in ("loss", "train_loss"))
    assert groups == {"training": 8, "validation": 4, "epoch": 2}
    assert {plain_name("length <mm>"), "loss"} <= {o[1] for o in found if o[0] == "validation"}


def test_parameters_and_pictures(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    client, run = need_extra("mlflow.tracking", "mlflow").MlflowClient(own_store(trained.parent)), kept_name(trained, "mlflow")
    assert client.get_run(run).data.params["trainer.params.max_epochs"] == "2" and client.get_run(run).info.status == "FINISHED"
    assert {"name": "model.params.rnn_key", "value": "gru"} in list(csv.DictReader((trained / "csv/parameters.csv").open()))
    params = {o["payload"]["param"]["paramName"]: o["payload"]["param"]["paramValue"] for o in archived(trained) if o["type"] == "parameter_msg"}
    assert params["sampler.params.batch_size_training"] == "40"
    text = EventAccumulator(str(trained / "tensorboard/parameters")).Reload()
    assert b"trainer.params.max_epochs" in text.Tensors("parameters/text_summary")[0].tensor_proto.string_val[0]
    pixels = lambda png: np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    drawn = EventAccumulator(str(trained / "tensorboard/pictures")).Reload().Images("lines")
    assert [(o.step, pixels(o.encoded_image_string)[0, 0, 0]) for o in drawn] == [(0, 50), (1, 51)]
    kept = sorted((trained.parent / "mlflow_pictures").rglob("lines_*.png"))
    assert [pixels(o.read_bytes())[0, 0, 0] for o in kept] == [50, 51] == [pixels(o.read_bytes())[0, 0, 0] for o in sorted((trained / "csv").glob("*.png"))]
    assert sum("figName" in (o["payload"].get("additional_params") or {}) for o in archived(trained)) == 2


@pytest.mark.browser
def test_mlflow_shows_the_run_in_its_page(browser, trained, tmp_path):
    "Its own server on the experiments' store: the run's page has our values and their curves."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store, log = own_store(trained.parent), open(tmp_path / "server.txt", "w")
    server = subprocess.Popen([sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
                              start_new_session=True, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
    page = browser.new_page()
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2); break
            except OSError: time.sleep(0.5)
        else: pytest.fail((tmp_path / "server.txt").read_text()[-2000:])
        run = need_extra("mlflow.tracking", "mlflow").MlflowClient(store).get_run(kept_name(trained, "mlflow"))
        page.goto(f"http://127.0.0.1:{port}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}")
        page.wait_for_selector("text=epoch/train_loss", timeout=60_000)
        assert page.get_by_text("epoch/valid_loss").count() and page.get_by_text("validation/loss").count()
        page.goto(f"http://127.0.0.1:{port}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/model-metrics")
        page.wait_for_selector("svg.main-svg", timeout=60_000)
        page.screenshot(path=tmp_path / "mlflow.png")
    finally:
        page.close()
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def test_weights_are_the_same_without_loggers(dataset, trained, tmp_path):
    plain = make(dataset, tmp_path, sinks=())
    plain.train_and_validate()
    a, b = (torch.load(folder / "best_model/model_state.pkl", weights_only=True) for folder in (tmp_path / "run", trained))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [read_logs(folder)["valid_loss"] for folder in (tmp_path / "run",)] == [read_logs(trained)["valid_loss"]]


def test_nothing_is_imported_before_it_is_used():
    code = "import sys, dwiml_nb.all, dwiml_nb.training.loggers as l; l.SINKS['mlflow'](); l.SINKS['comet'](); print([m for m in ('mlflow', 'comet_ml', 'tensorboard', 'lightning_fabric') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


KILLED = """
import sys, os, signal
sys.path.insert(0, sys.argv[1])
from test_loggers import *
dataset = MultiSubjectDataset(sys.argv[2]).load_data()
trainer, seen = make(dataset, sys.argv[3]), []
def die(row):
    seen.append(row)
    if len(seen) == 9:
        from pathlib import Path
        folder, until = Path(sys.argv[3]) / "run", time.monotonic() + 120
        while not all((folder / f"loggers/{key}.json").exists() for key in ("comet", "mlflow")) or ("training", "loss", 4) not in {o[:3] for o in in_mlflow(folder)}:
            time.sleep(0.2)
            assert time.monotonic() < until
        os.kill(os.getpid(), signal.SIGKILL)
trainer.control.on_batch_end.append(die)
trainer.train_and_validate()
"""


def test_a_killed_run_continues_the_same_record(study, dataset, tmp_path):
    "Killed in its second epoch, after loggers had rows that come again: each number is there once, in the same record."
    done = subprocess.run([sys.executable, "-c", KILLED, os.path.dirname(__file__), str(study), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    folder = tmp_path / "run"
    before = [kept_name(folder, key) for key in ("mlflow", "comet")]
    trainer_from_folder(tmp_path, "run", device="cpu", new_max_epochs=3).train_and_validate()
    assert [kept_name(folder, key) for key in ("mlflow", "comet")] == before
    for key in KEYS: check_same_numbers(folder, key)
    client = need_extra("mlflow.tracking", "mlflow").MlflowClient(own_store(tmp_path))
    assert len(client.search_runs([client.get_run(before[0]).info.experiment_id])) == 1


@SINKS.register("slow")
class Slow(Logger):
    "Takes its time."
    def open(self, record): return SlowBook()


class SlowBook(Book):
    def write(self, numbers): time.sleep(300)


def test_a_slow_logger_holds_nothing_up(dataset, tmp_path):
    trainer = make(dataset, tmp_path, sinks=[dict(key="slow", wait=0.2, every=0, most=5), "csv"])
    began = time.monotonic()
    with pytest.warns(UserWarning, match=r"Slow lost \d+ of 14 rows and pictures: .*send_logs") as told: trainer.train_and_validate()
    assert time.monotonic() - began < 200 and len([w for w in told if "lost" in str(w.message)]) == 1
    assert len(read_logs(tmp_path / "run", "batches")["loss"]) == 12 and trainer.control.state == "ended"


def test_a_server_that_is_gone(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    trainer = make(dataset, tmp_path, sinks=[dict(key="mlflow", uri="http://127.0.0.1:9", every=0.05)])
    with pytest.warns(UserWarning, match="MLflowLogger lost 14 of 14 rows and pictures"): trainer.train_and_validate()
    assert trainer.control.state == "ended" and not (tmp_path / "run/loggers").exists()
    send_logs(tmp_path / "run", dict(key="mlflow", uri=own_store(tmp_path), wait=300))
    check_same_numbers(tmp_path / "run", "mlflow")


def test_a_server_that_only_a_file_names_is_not_called(dataset, tmp_path, monkeypatch):
    sinks = [dict(key="mlflow", uri="http://127.0.0.1:9", wait=0), dict(key="csv", wait=300)]
    with pytest.warns(UserWarning, match="lost"): make(dataset, tmp_path, sinks=sinks, epochs=1).train_and_validate()
    record = json.loads((tmp_path / "run/parameters_latest.json").read_text())
    assert record["trainer"]["params"]["sinks"] == sinks
    with pytest.warns(UserWarning, match="http://127.0.0.1:9', which only its record names"):
        again = trainer_from_folder(tmp_path, "run", device="cpu", new_max_epochs=2)
    assert again.given_sinks == sinks[1:]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert trainer_from_folder(tmp_path, "run", device="cpu", new_max_epochs=2).given_sinks == sinks


@pytest.mark.parametrize("options, words", [(dict(uri=1, colour=2), "takes no 'colour'"), (dict(most=0), "most is a whole number >= 1"), (dict(wait=-1), "wait is a number >= 0")])
def test_options_that_are_wrong(options, words):
    with pytest.raises(ValueError, match=words): sink_of(dict(key="mlflow", **options))


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("dwiml_nb.training.loggers.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "comet_ml", None)
    with pytest.raises(ValueError, match=r'pip install "dwiml_nb\[comet\]"'): sink_of("comet")


def test_archives_that_are_broken(trained, tmp_path):
    (tmp_path / "comet").mkdir()
    (tmp_path / "comet/torn.zip").write_bytes(archives(trained)[0].read_bytes()[:-30])
    assert archives(tmp_path) == []
