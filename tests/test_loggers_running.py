"""Loggers while a training runs: a real MLflow server that dies, states in MLflow, pictures in every logger, rows sent meanwhile, nothing twice."""
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from dwiml_nb.cli.common import run_command
from dwiml_nb.cli.logs import dwiml_send_value_to_comet_from_log
from dwiml_nb.core.errors import DataProblem
from dwiml_nb.core.options import need_extra
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.runs.resume import trainer_from_folder
from dwiml_nb.runs.run_files import train
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.loggers import archived, kept_name, own_store, send_logs
from dwiml_nb.training.sinks import read_logs
from test_loggers import check_same_numbers, make

RUN = """[data]
hdf5_file = "study.hdf5"
input_group_name = "input"
streamline_group_name = "bundles"
[model]
rnn_layer_sizes = [4]
step_size = 2.0
[sampler]
batch_size_training = 30
batch_size_validation = 20
[training]
name = "DWIMLTrainerOneInputWithGVPhase"
experiment_name = "drawn"
max_epochs = 2
max_batches_per_epoch_training = 2
max_batches_per_epoch_validation = 1
add_a_tracking_validation_phase = true
tracking_phase_mask_group = "wm_mask"
device = "cpu"
[logging]
sinks = ["pictures", {key = "csv", wait = 300}, {key = "tensorboard", wait = 300}, {key = "mlflow", wait = 300}, {key = "comet", wait = 300}]
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory): return toy_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def dataset(study): return MultiSubjectDataset(study).load_data()


def client_of(store): return need_extra("mlflow.tracking", "mlflow").MlflowClient(store)


def until(is_there, seconds=120):
    end = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < end, "it did not come"
        time.sleep(.1)


# ---- a server

@pytest.fixture
def server(tmp_path):
    "An MLflow server on this machine, with a SQLite file: (address, function that kills it)."
    pytest.importorskip("mlflow", reason="no MLflow: pip install 'dwiml_nb[mlflow]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "artifacts"), "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with open(tmp_path / "server.txt", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "mlflow", "server", *words], start_new_session=True, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
    def kill():
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2); break
            except OSError: time.sleep(.5)
        else: pytest.fail((tmp_path / "server.txt").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}", kill
    finally: kill()


def test_a_server_that_dies_holds_nothing_up(dataset, tmp_path, server, monkeypatch):
    "It has the rows of the first epoch; then it is killed. The training goes on, its logs are whole, and what the server lacks is told and sent later."
    address, kill = server
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    trainer = make(dataset, tmp_path, sinks=[dict(key="mlflow", uri=address, every=.02, wait=20)], epochs=3)
    folder, store = tmp_path / "run", f"sqlite:///{tmp_path}/server.db"
    def there():
        run = kept_name(folder, "mlflow") if (folder / "loggers").is_dir() else None
        return run and len(client_of(address).get_metric_history(run, "epoch/train_loss")) == 1
    def dies(row):
        if row["epoch"]: return
        until(there)
        trainer.sinks.send("picture", "lines", png(9), 0)
        until(lambda: list((tmp_path / "artifacts").rglob("lines_0000*.png")))
        kill()
    trainer.control.on_epoch_end.append(dies)
    with pytest.warns(UserWarning, match=r"MLflowLogger lost 14 of 22 rows and pictures: .*send_logs"): trainer.train_and_validate()
    assert trainer.control.state == "ended" and len(read_logs(folder, "batches")["loss"]) == 18 and read_logs(folder)["epoch"] == [0, 1, 2]
    run = kept_name(folder, "mlflow")
    assert client_of(store).get_run(run).info.status == "RUNNING"                   # as the server knew it
    send_logs(folder, dict(key="mlflow", uri=store, wait=300))
    assert kept_name(folder, "mlflow") == run and client_of(store).get_run(run).info.status == "FINISHED"
    monkeypatch.setattr("test_loggers.own_store", lambda path: store)
    check_same_numbers(folder, "mlflow")


def png(colour):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), colour, "u1")).save(file, "png")
    return file.getvalue()


def test_mlflow_knows_how_a_training_ended(dataset, tmp_path):
    "Failed; gone on and stopped; gone on to its end."
    def status(): return client_of(own_store(tmp_path)).get_run(kept_name(tmp_path / "run", "mlflow")).info.status
    def fails(row): raise RuntimeError("a batch went wrong")
    trainer = make(dataset, tmp_path, sinks=[dict(key="mlflow", wait=300, every=0.02)])
    trainer.run_one_batch = fails
    with pytest.raises(RuntimeError, match="a batch went wrong"): trainer.train_and_validate()
    assert status() == "FAILED"
    again = trainer_from_folder(tmp_path, "run", device="cpu")
    again.control.on_batch_end.append(lambda row: again.control.request_stop())
    again.train_and_validate()
    assert again.control.state == "stopped" and status() == "KILLED"
    trainer_from_folder(tmp_path, "run", device="cpu").train_and_validate()
    assert status() == "FINISHED"
    check_same_numbers(tmp_path / "run", "mlflow")


# ---- pictures

def pixels(file): return np.asarray(Image.open(file).convert("RGB"))


def test_pictures_are_in_every_logger(study, tmp_path):
    "Losses and generated lines of each epoch, the same pixels in each logger; weights and logs as without."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    file = study.parent / "run.toml"
    file.write_text(RUN)
    folder = train(file, f"training.experiments_path={tmp_path}").experiment_folder
    plain = train(file, f"training.experiments_path={tmp_path}", "training.experiment_name=plain", "logging.sinks=[]").experiment_folder
    a, b = (torch.load(f / "checkpoint/model/model_state.pkl", weights_only=True) for f in (folder, plain))
    assert all(torch.equal(a[k], b[k]) for k in a) and read_logs(folder, "batches")["loss"] == read_logs(plain, "batches")["loss"]
    wanted = {(name, epoch): pixels(folder / f"csv/{name}_{epoch:04d}.png") for name in ("loss", "generation") for epoch in (0, 1)}
    assert all(len(np.unique(p.reshape(-1, 3), axis=0)) > 20 for p in wanted.values()) and (wanted["generation", 0] != wanted["generation", 1]).any()
    events = EventAccumulator(str(folder / "tensorboard/pictures"), size_guidance={"images": 0}).Reload()
    drawn = {(tag, o.step): pixels(io.BytesIO(o.encoded_image_string)) for tag in events.Tags()["images"] for o in events.Images(tag)}
    kept = {(p.stem[:-5], int(p.stem[-4:])): pixels(p) for p in (tmp_path / "mlflow_pictures").rglob("*.png")}
    sent = {(o["payload"]["additional_params"]["figName"], o["payload"]["additional_params"]["step"]) for o in archived(folder) if "figName" in (o["payload"].get("additional_params") or {})}
    assert sent == wanted.keys() == drawn.keys() == kept.keys()
    assert all((drawn[k] == v).all() and (kept[k] == v).all() for k, v in wanted.items())


# ---- rows sent meanwhile

def test_rows_sent_while_it_trains_are_there_once(dataset, tmp_path, capsys):
    "To a logger of its own: refused. To another one: there, and added to later, without doubles."
    trainer = make(dataset, tmp_path, sinks=[dict(key="csv", wait=300, every=0.02), dict(key="comet", wait=300)])
    folder, told = tmp_path / "run", []
    def meanwhile(row):
        if row["epoch"]: return
        for key in ("csv", "comet"):
            with pytest.raises(DataProblem, match=f"the training goes on, and sends its rows to {key} itself"): send_logs(folder, key)
        with pytest.raises(SystemExit, match="sends its rows to comet itself"): run_command(dwiml_send_value_to_comet_from_log, [str(tmp_path), "run", "--use_suggested_names"])
        for _ in range(2): send_logs(folder, *(dict(key=k, wait=300, every=0.02) for k in ("tensorboard", "mlflow")))
        told.append(client_of(own_store(tmp_path)).get_run(kept_name(folder, "mlflow")).info.status)
    trainer.control.on_epoch_end.append(meanwhile)
    trainer.train_and_validate()
    assert told == ["RUNNING"]
    for _ in range(2): send_logs(folder, *(dict(key=k, wait=300, every=0.02) for k in ("tensorboard", "mlflow", "csv", "comet")))
    for key in ("csv", "tensorboard", "mlflow", "comet"): check_same_numbers(folder, key)
    assert client_of(own_store(tmp_path)).get_run(kept_name(folder, "mlflow")).info.status == "FINISHED"
    capsys.readouterr()
    run_command(dwiml_send_value_to_comet_from_log, [str(tmp_path), "run", "--logs", "train_loss", "--use_suggested_names"])
    assert "2 of 2 values are there already" in capsys.readouterr().out
    check_same_numbers(folder, "comet")
