"""Training in several processes: the numbers of one process, one decision for all, and a process that is killed.

Ranks are forked (tests/distributed_script.py) and connected by Fabric with gloo; `benchmarks/several.py` prints longer tables.
"""
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_script import in_ranks, make, make_registered, start, train

from dwiml_nb.core.errors import DataProblem
from dwiml_nb.runs.run_files import run_config
from dwiml_nb.runs.sweeps import sweep_table
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training import several
from dwiml_nb.training.checkpoints import read_checkpoint
from dwiml_nb.training.sinks import read_logs, read_rows
from dwiml_nb.training.trainer import DWIMLTrainerOneInput

pytest.importorskip("lightning_fabric")
NOISY = dict(dropout=.2, noise=.1, learning_rates=[.01], optimizer="AdamW", ema_decay=.9, clip_grad=1.)


@pytest.fixture(scope="module")
def study(tmp_path_factory): return toy_study(tmp_path_factory.mktemp("study"))


def apart(a, b): return max(np.abs(a[name] - b[name]).max() for name in a)
def same(a, b): return all((a[name] == b[name]).all() for name in a)
def losses(folder, name, which="batches"): return [row["loss" if which == "batches" else "train_loss"] for row in read_rows(folder/name/"logs"/f"{which}.jsonl")]


@pytest.mark.parametrize("of, dtype, options", [
    (make, "float64", dict(max_batches_per_epoch_training=None, max_epochs=1, accumulate=2, clip_grad=.5, ema_decay=.9)),   # the last batch is small
    (make, "float32", dict(batch_size=1, max_epochs=1)),                                                                     # rank 1 has nothing to do
    (make_registered, "float64", dict(max_batches_per_epoch_training=None, max_epochs=1, clip_grad=.5)),
])
def test_two_processes_give_the_numbers_of_one(study, tmp_path, of, dtype, options):
    one = train(of, study, tmp_path, "one", dtype=dtype, **options)
    two, other = in_ranks(partial(train, of, study, tmp_path, "two", devices=2, dtype=dtype, **options))
    assert same(two, other)
    assert apart(one, two) < (1e-9 if dtype == "float64" else 1e-4)
    for which in "batches", "epochs":
        a, b = (read_logs(tmp_path/name, which) for name in ("one", "two"))
        assert a.keys() == b.keys() and len(a["n"]) > 1 - (which == "epochs")
        assert a["n"] == b["n"]
        for column in a.keys() & {"loss", "train_loss", "valid_loss", "grad_norm"}:
            assert np.allclose(*(np.array(o[column], float) for o in (a, b)), rtol=0, atol=1e-9 if dtype == "float64" else 1e-4, equal_nan=True)


def stop_after(trainer, nb, rank):
    "A stop that only one rank is asked for."
    left = iter(range(nb - 1, -1, -1))
    if trainer.ranks.rank == rank: trainer.control.on_batch_end.append(lambda row: next(left, 1) or trainer.control.request_stop())


def test_a_stop_is_the_same_in_all_ranks_and_what_follows_is_what_had_followed(study, tmp_path):
    whole, _ = in_ranks(partial(train, make, study, tmp_path, "whole", devices=2, **NOISY))
    stopped = in_ranks(partial(train, make, study, tmp_path, "cut", devices=2, after=partial(stop_after, nb=3, rank=1), **NOISY))
    assert same(*stopped) and not same(whole, stopped[0])
    assert read_checkpoint(tmp_path/"cut").state["batch"] == 3
    again, other = in_ranks(partial(train, make, study, tmp_path, "cut", devices=2, resume=True, dropout=.2, noise=.1))
    assert same(whole, again) and same(again, other)
    assert losses(tmp_path, "whole") == losses(tmp_path, "cut")


def test_a_checkpoint_moves_between_numbers_of_processes(study, tmp_path):
    options = dict(dtype="float64", accumulate=3)
    one = train(make, study, tmp_path, "one", **options)
    in_ranks(partial(train, make, study, tmp_path, "moves", devices=2, after=partial(stop_after, nb=2, rank=0), **options))
    train(make, study, tmp_path, "moves", resume=True, dtype="float64", after=partial(stop_after, nb=3, rank=0))
    moved, _ = in_ranks(partial(train, make, study, tmp_path, "moves", devices=2, resume=True, dtype="float64"))
    assert apart(one, moved) < 1e-12
    assert np.allclose(losses(tmp_path, "one"), losses(tmp_path, "moves"), rtol=0, atol=1e-12)
    record = read_checkpoint(tmp_path/"moves").params
    assert record.keys() == read_checkpoint(tmp_path/"one").params.keys() and "devices" not in record["trainer"]["params"]


class Spoilt(DWIMLTrainerOneInput):
    "The loss of rank 1 is NaN in the second batch."
    def run_one_batch(self, batch):
        loss, n = super().run_one_batch(batch)
        return loss*(float("nan") if self.ranks.rank and batch.place[1:] == (0, 1) else 1.), n


def test_a_loss_that_is_not_finite_in_one_rank_is_skipped_by_all_or_told_with_its_lines(study, tmp_path):
    skipping = dict(cls=Spoilt, devices=2, on_nan="skip", max_epochs=1)
    one, two = in_ranks(partial(train, make, study, tmp_path, "skips", **skipping))
    assert same(one, two)
    rows = read_rows(tmp_path/"skips"/"logs"/"batches.jsonl")
    assert [row["skipped"] for row in rows if row["phase"] == "training"] == [0, 1, 0, 0]
    told = in_ranks(partial(train, make, study, tmp_path, "stops", **{**skipping, "on_nan": "stop"}))
    for words in told:
        assert words.startswith("NotFinite: the loss is nan at training batch 2 of epoch 1") and "in rank 1" in words and "in rank 0" not in words


def uneven(trainer):
    "Rank 1 leaves out the optimizer's step of its second batch."
    assert torch.get_num_threads() == 1                                          # threads are not there after a fork: whoever waits for them hangs
    own, left = trainer.registered, iter([False])
    real = own.net.optimizer.step
    if trainer.ranks.rank: own.net.optimizer.step = lambda *a, **k: real(*a, **k) if next(left, True) is False else None


def test_ranks_that_make_different_steps_are_told_at_once(study, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try: told = in_ranks(partial(train, make_registered, study, tmp_path, "uneven", devices=2, after=uneven))
    finally: torch.set_num_threads(threads)
    for words in told:
        assert words.startswith("ComeApart: ") and "rank 0 at a step of the optimizer, rank 1 at the end of a batch" in words
    assert read_checkpoint(tmp_path/"uneven").state["epoch"] == 0


def test_who_starts_processes_is_known_or_asked_for(monkeypatch):
    for k in [k for k in os.environ if k.startswith("SLURM_")]: monkeypatch.delenv(k)
    for variables, name in (({"SLURM_NTASKS": "2"}, "LightningEnvironment"),                  # sbatch, salloc
                            ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "interactive"}, "SLURMEnvironment")):
        for k, v in variables.items(): monkeypatch.setenv(k, v)
        assert [type(o).__name__ for o in several.environment()] == [name]
    assert several.started_by() == (2, 1)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(DataProblem, match="cannot be started and connected.*ntasks-per-node"): several.launched(2, device="cpu")
    for k in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "MASTER_ADDR", "LOCAL_RANK"): monkeypatch.delenv(k, raising=False)
    with pytest.raises(DataProblem, match="nothing here starts processes on 3 machines"): several.launched(2, 3, "cpu")
    monkeypatch.setattr("sys.argv", ["-c"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    with pytest.raises(DataProblem, match="no file of it. Expected: python script.py. Found: -c"): several.launched(2, device="cpu")


def commanded(*words):
    from dwiml_nb.cli.common import run_command
    from dwiml_nb.cli.runs import dwiml_train
    run_command(dwiml_train, [*words, "--devices", "2", "training.device=cpu"])


def test_the_command_and_what_it_writes(study, tmp_path):
    (tmp_path/"run.toml").write_text(f"""[data]\nhdf5_file = "{study}"\ninput_group_name = "input"\nstreamline_group_name = "bundles"
[model]\nstep_size = 2.0\nrnn_layer_sizes = [4]\n[training]\nexperiment_name = "by_command"\nmax_epochs = 1\nmax_batches_per_epoch_training = 2\n""")
    assert in_ranks(partial(commanded, str(tmp_path/"run.toml"))) == [None, None]
    folder = tmp_path/"experiments"/"by_command"
    assert len(read_rows(folder/"logs"/"epochs.jsonl")) == len([row for row in read_rows(folder/"sessions.jsonl") if "began" in row]) == 1
    with pytest.raises(DataProblem, match="a trial of a sweep trains in one process"): sweep_table(run_config(folder))


def test_a_command_with_two_processes_is_stopped_by_ctrl_c_and_gone_on_with(study, tmp_path):
    (tmp_path/"run.toml").write_text(f"""[data]\nhdf5_file = "{study}"\ninput_group_name = "input"\nstreamline_group_name = "bundles"
[model]\nstep_size = 2.0\nrnn_layer_sizes = [4]\n[training]\nexperiment_name = "typed"\nmax_epochs = 60\nmax_batches_per_epoch_training = 2\n""")
    folder = tmp_path/"experiments"/"typed"
    def typed(name, *words): return subprocess.Popen([Path(sys.executable).with_name(name), *words, "--devices", "2"], cwd=tmp_path, text=True,
                                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    run, end = typed("dwiml_train", "run.toml"), time.monotonic() + 100
    while not (folder/"logs"/"epochs.jsonl").exists() and run.poll() is None and time.monotonic() < end: time.sleep(.02)
    os.killpg(run.pid, signal.SIGINT)                                    # as a terminal does
    told, _ = run.communicate(timeout=60)
    assert run.returncode == 130 and told.count("Interrupted: stopped at epoch ") == 1, told
    assert f"epoch 1/60: training loss {read_logs(folder, 'epochs')['train_loss'][0]:.6g}, validation loss {read_logs(folder, 'epochs')['valid_loss'][0]:.6g}, best" in told
    again = typed("dwiml_resume_training_from_checkpoint", "experiments", "typed")
    told, _ = again.communicate(timeout=100)
    assert again.returncode == 0 and "ended; best epoch" in told, told
    assert [row["epoch"] for row in read_rows(folder/"logs"/"epochs.jsonl")] == [*range(60)]


def ended_at(trainer, nb, number):
    left = iter(range(nb - 1, -1, -1))
    if trainer.ranks.rank == 1: trainer.control.on_batch_end.append(lambda row: next(left, 1) or os.kill(os.getpid(), number))


def test_a_killed_rank_ends_the_run_with_its_name_and_a_whole_checkpoint(study, tmp_path):
    whole, _ = in_ranks(partial(train, make, study, tmp_path, "whole", devices=2, **NOISY))
    ranks, talk = start(partial(train, make, study, tmp_path, "cut", devices=2, after=partial(ended_at, nb=8, number=signal.SIGKILL), **NOISY))
    rank, told = talk.get(timeout=60)
    for process in ranks: process.join(20)
    assert rank == 0 and [process.exitcode for process in ranks] == [1, -signal.SIGKILL]
    assert f"rank 1 (process {ranks[1].pid} of" in told and "does not answer any more" in told
    assert read_checkpoint(tmp_path/"cut").state["epoch"] == 1
    again, _ = in_ranks(partial(train, make, study, tmp_path, "cut", devices=2, resume=True, dropout=.2, noise=.1))
    assert same(whole, again)


def test_a_rank_that_hangs_is_named_too(study, tmp_path, monkeypatch):
    monkeypatch.setattr(several, "TIMEOUT", 5.)
    ranks, talk = start(partial(train, make, study, tmp_path, "hangs", devices=2, after=partial(ended_at, nb=3, number=signal.SIGSTOP)))
    rank, told = talk.get(timeout=60)
    ranks[1].kill()
    for process in ranks: process.join(20)
    assert rank == 0 and f"rank 1 (process {ranks[1].pid} of" in told
    assert read_checkpoint(tmp_path/"hangs").state["epoch"] == 0
