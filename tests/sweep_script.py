"""Workers of a sweep, for processes of their own; one may be killed at a place that the test names."""
import os
import signal

import torch

import dwiml_nb.runs.sweeps as sweeps
from dwiml_nb.core.registry import trusting
from dwiml_nb.training.trainer import DWIMLTrainer

torch.set_num_threads(1)


def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)


def then_die(method):
    def done(*args, **kwargs):
        method(*args, **kwargs)
        die()
    return done


def second_batch(self, row):
    if row["batch"] == 1: die()


KILLS = {  # what is replaced in the worker -> when it dies
    "a trial is there, and has no values": (sweeps, "draw_values", die),
    "it is claimed": (sweeps, "do_trial", die),
    "its objects are made": (DWIMLTrainer, "train_and_validate", die),
    "within an epoch": (sweeps.PruneEpochs, "batch", second_batch),
    "an epoch is in the log, and not reported": (sweeps.PruneEpochs, "report", die),
    "an epoch is reported, and has no checkpoint": (sweeps.PruneEpochs, "report", then_die(sweeps.PruneEpochs.report)),
    "it is trained, and has no result": (sweeps, "result", die),
    "it is told": (sweeps, "do_trial", then_die(sweeps.do_trial))}


def work(source, folder, overrides=(), kill=None, trust=()):
    if kill:
        owner, name, instead = KILLS[kill]
        setattr(owner, name, instead)
    with trusting(trust): sweeps.work(source, overrides, folder)
