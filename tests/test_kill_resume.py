"""Kill a training anywhere, resume it, and end with the same bits: weights, order of batches, logged values.

Each training is a process of its own, started by the fork server of conftest.py, which has imported the library once.
"""
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

import kill_script
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.checkpoints import read_checkpoint
from dwiml_nb.training.sinks import read_logs

CTX = multiprocessing.get_context("forkserver")
CONFIGS = [dict(workers=0, lazy=False), dict(workers=2, lazy=True), dict(workers=2, lazy=False), dict(workers=0, lazy=True)]
MAX_EPOCHS = 4


@pytest.fixture(scope="session")
def study(tmp_path_factory): return str(toy_study(tmp_path_factory.mktemp("study")))


@pytest.fixture(scope="session")
def through(study, tmp_path_factory):
    "The run that nobody interrupts."
    folder = tmp_path_factory.mktemp("through")
    assert run(folder, study) == 0
    return folder / "run"


def start(folder, study, **kwargs):
    process = CTX.Process(target=kill_script.train, args=(str(folder), study), kwargs={"max_epochs": MAX_EPOCHS, **kwargs})
    process.start()
    return process


def run(folder, study, timeout=180, **kwargs):
    "Run to its end, killed or not; the exit code."
    process = start(folder, study, **kwargs)
    process.join(timeout)
    assert process.exitcode is not None, "the training hangs"
    return process.exitcode


def order_of(experiment):
    "place -> lines of every batch that was trained; a batch trained twice must have been the same both times."
    order = {}
    for line in Path(f"{experiment}.order.jsonl").read_bytes().splitlines():
        try: subset, epoch, index, *what = json.loads(line)
        except ValueError: continue  # the line in which it was killed
        assert order.setdefault((subset, epoch, index), what) == what
    return order


def assert_same(experiment, through):
    "Bit-equal weights, best weights, optimizer, logs and order of batches."
    mine, other = read_checkpoint(experiment), read_checkpoint(through)
    for name in ("checkpoint/model", "best_model"):
        a, b = (torch.load(e / name / "model_state.pkl", weights_only=True) for e in (experiment, through))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    for i, slots in other.state["optimizer"]["state"].items():
        assert all(torch.equal(slots[k], mine.state["optimizer"]["state"][i][k]) for k in slots)
    assert {k: mine.state[k] for k in ("epoch", "phase", "batch", "sums", "monitor")} == {k: other.state[k] for k in ("epoch", "phase", "batch", "sums", "monitor")}
    for which in ("batches", "epochs"):
        a, b = ({k: v for k, v in read_logs(e, which).items() if "second" not in k} for e in (experiment, through))
        assert a == b, which
    assert order_of(experiment) == order_of(through)
    assert not [p.name for p in experiment.iterdir() if p.name.endswith(".previous") or ".partial" in p.name]


def test_uninterrupted_run_does_not_depend_on_workers_or_laziness(study, through, tmp_path):
    assert len(read_logs(through)["epoch"]) == MAX_EPOCHS and len(read_logs(through, "batches")["epoch"]) == MAX_EPOCHS * 5
    for i, config in enumerate(CONFIGS[1:]):
        assert run(tmp_path, study, name=f"run{i}", **config) == 0
        assert_same(tmp_path / f"run{i}", through)


def kill_at_random(folder, study, times, seed):
    "Kill as often as asked, each time after a random delay, alternating workers and laziness; then run to the end. How far each got."
    chance, table = random.Random(seed), []
    for i in range(times):
        process, delay = start(folder, study, pause=0.02, **CONFIGS[i % len(CONFIGS)]), chance.uniform(0, 1.5)
        while process.exitcode is None and not (folder / f"started.{process.pid}").exists(): time.sleep(0.01)
        process.join(delay)
        if process.exitcode is None: os.kill(process.pid, signal.SIGKILL)
        process.join()
        there = (folder / "run").exists()
        state = read_checkpoint(folder / "run").state if there else {"epoch": "-", "batch": "-"}
        rows = len(read_logs(folder / "run", "batches").get("epoch", [])) if there else 0
        table.append((f"{delay:.2f} s", CONFIGS[i % len(CONFIGS)], process.exitcode, f"resumes at epoch {state['epoch']}, batch {state['batch']}", f"{rows} rows logged"))
        if there and state["epoch"] == MAX_EPOCHS: break
    if not (folder / "run").exists() or read_checkpoint(folder / "run").state["epoch"] < MAX_EPOCHS: assert run(folder, study, **CONFIGS[1]) == 0
    return table


def test_three_kills_at_random(study, through, tmp_path):
    for row in kill_at_random(tmp_path, study, 3, seed=1): print(*row, sep=" | ")
    assert_same(tmp_path / "run", through)


@pytest.mark.slow
def test_twenty_kills_at_random(study, through, tmp_path):
    done, seed = 0, 100
    while done < 20:
        folder = tmp_path / str(seed)
        folder.mkdir()
        table = kill_at_random(folder, study, 5, seed)
        for row in table: print(*row, sep=" | ")
        assert_same(folder / "run", through)
        done, seed = done + sum(row[2] == -signal.SIGKILL for row in table), seed + 1


WRITING = {"best_model": ["clear leftovers", "make folder", "write .", "flush"],
           "checkpoint": ["clear leftovers", "make folder", "write params.json", "write state.pt", "write model", "flush"]}


def kill_at(folder, study, name, step, times=0, exchange=True):
    assert run(folder, study, die=(name, step, times), exchange=exchange) == -signal.SIGKILL, (name, step)


def test_kill_between_every_two_steps_of_the_first_checkpoint(study, through, tmp_path):
    "An experiment exists from the moment its first checkpoint is whole; until then it is started again."
    for step in WRITING["checkpoint"] + ["rename", "clear previous"]:
        kill_at(tmp_path, study, "checkpoint", step)
        assert not (tmp_path / "run").exists()
    assert run(tmp_path, study) == 0
    assert_same(tmp_path / "run", through)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "no-exchange"])
def test_kill_between_every_two_steps_after_an_epoch(study, through, tmp_path, exchange):
    "Every step of writing best_model (new, then replaced) and checkpoint after the first epochs, each in a process of its own."
    assert run(tmp_path, study, max_epochs=MAX_EPOCHS, die=("best_model", "rename", 0)) == -signal.SIGKILL  # also starts the experiment
    swap = ["exchange", "clear old", "clear previous"] if exchange else ["set aside", "rename"]
    table = [("best_model", step) for step in WRITING["best_model"] + swap] + [("checkpoint", step) for step in WRITING["checkpoint"] + swap]
    for name, step in table if exchange else table[len(WRITING["best_model"]):]:
        kill_at(tmp_path, study, name, step, exchange=exchange)
        state = read_checkpoint(tmp_path / "run").state
        print(f"killed after '{step}' of {name} | resumes at epoch {state['epoch']}, batch {state['batch']}")
    assert run(tmp_path, study, exchange=exchange) == 0
    assert_same(tmp_path / "run", through)


@pytest.mark.parametrize("number, config", [(signal.SIGINT, CONFIGS[1]), (signal.SIGTERM, CONFIGS[1]), (signal.SIGINT, CONFIGS[0])], ids=["ctrl-c-2-workers", "sigterm-2-workers", "ctrl-c"])
def test_signals_end_after_the_batch_with_a_checkpoint(study, through, tmp_path, number, config):
    "A signal to the whole group of processes, as a terminal or a cluster sends it, in the middle of the second epoch."
    process = start(tmp_path, study, pause=0.05, own_group=True, **config)
    order = tmp_path / "run.order.jsonl"
    for _ in range(6000):
        if order.exists() and order.read_bytes().count(b"\n") >= 7: break
        time.sleep(0.02)
    os.killpg(process.pid, number)
    process.join(60)
    assert process.exitcode == (1 if number == signal.SIGINT else -signal.SIGTERM)  # KeyboardInterrupt; ended by the signal
    state = read_checkpoint(tmp_path / "run").state
    done = [1, state["phase"], state["batch"]]
    assert state["epoch"] == 1 and state["batch"] >= 1, done
    assert len(read_logs(tmp_path / "run", "batches")["epoch"]) == 5 + state["batch"] + (3 if state["phase"] == "validation" else 0)  # nothing was lost
    assert run(tmp_path, study, **CONFIGS[3]) == 0
    assert_same(tmp_path / "run", through)
