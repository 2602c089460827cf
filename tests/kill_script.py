"""The training that test_kill_resume.py kills: a tiny Learn2Track on the toy study, started or resumed, then killed on request."""
import itertools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.core import folders
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.training.trainer import DWIMLTrainerOneInput

OPTIONS = dict(learning_rates="0.01*2 0.005", lr_schedule="cosine-warmup", optimizer="AdamW", clip_grad=1.0, device="cpu", seed=5)


class Recorder(DWIMLTrainerOneInput):
    "Writes down which streamlines each batch held, and can be slow."
    pause, order = 0.0, None

    def run_one_batch(self, batch):
        place = batch.ids_per_subj
        ids = [[subject, [int(i) for i in some]] for subject, some in batch.history["ids"]]
        row = json.dumps([place.subset, place.epoch, place.index, ids, batch.lines.data.double().sum().item()]) + "\n"
        fd = os.open(self.order, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, row.encode())
        os.close(fd)
        time.sleep(self.pause)
        return super().run_one_batch(batch)


def make_parts(study, lazy):
    dataset = MultiSubjectDataset(study, lazy=lazy)
    dataset.load_data(load_testing=False)
    torch.manual_seed(0)
    model = Learn2TrackModel(dataset.nb_features["input"], rnn_key="gru", rnn_layer_sizes=[8, 8], dropout=0.2, nb_previous_dirs=1, step_size=2.0,
                             dg_key="cosine-regression")
    sampler = DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=30, batch_size_validation=30, seed=3)
    loader = DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles", reverse_ratio=0.5, noise_mm_forward=0.1, seed=4)
    return model, sampler, loader


def die_at(wanted, diary):
    "SIGKILL this process when a step of writing a folder is done, for instance ('checkpoint', 'flush', 0): its first time."
    name_wanted, step_wanted, times = wanted
    count, real = itertools.count(), folders.write_folder_steps

    def steps(folder, parts, *more):
        for step in real(folder, parts, *more):
            if (Path(folder).name, step) == (name_wanted, step_wanted) and next(count) == times:
                with open(diary, "a") as f: f.write(f"{name_wanted}: {step}\n")
                os.kill(os.getpid(), signal.SIGKILL)
            yield step
    folders.write_folder_steps = steps


def cannot_exchange(*folders): raise OSError("no exchange of names here")


def train(folder, study, name="run", workers=0, lazy=False, max_epochs=4, die=None, exchange=True, pause=0.0, own_group=False):
    "Start the experiment, or resume it if it exists."
    multiprocessing.set_start_method("fork", force=True)  # for the workers: a child of a fork server would use another one
    torch.set_num_threads(1)
    if own_group:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job that a shell runs in the background begins with Ctrl-C ignored
    if not exchange: folders.exchange_folders = cannot_exchange
    if die: die_at(die, f"{folder}/kills.txt")
    model, sampler, loader = make_parts(study, lazy)
    Recorder.pause, Recorder.order = pause, f"{folder}/{name}.order.jsonl"
    if Path(folder, name).exists():
        trainer = Recorder.init_from_checkpoint(model, folder, name, sampler, loader, nb_cpu_processes=workers, device="cpu")
    else:
        trainer = Recorder(model, folder, name, sampler, loader, nb_cpu_processes=workers, max_epochs=max_epochs, max_batches_per_epoch_training=3,
                           max_batches_per_epoch_validation=2, **OPTIONS)
    Path(folder, f"started.{os.getpid()}").touch()
    trainer.train_and_validate()
