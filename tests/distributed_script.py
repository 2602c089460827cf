"""Trainings in one process or several, for test_distributed.py and benchmarks/several.py: forked ranks that Fabric connects."""
import multiprocessing
import os
import socket
import sys
import traceback

import numpy as np
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.core.ragged import Ragged
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.models.items import RegisteredBatchLoader
from dwiml_nb.models.learn2track import Learn2TrackModel
from dwiml_nb.models.registered import dwiml_model, registered_model
from dwiml_nb.training.registered import RegisteredTrainer
from dwiml_nb.training.several import Ranks, launched
from dwiml_nb.training.trainer import DWIMLTrainerOneInput


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_rank(rank, port, talk, work, args):
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try: talk.put((rank, work(*args)))
    except BaseException as e:
        traceback.print_exc(file=sys.stdout)
        talk.put((rank, f"{type(e).__name__}: {e}"))
        sys.exit(1)


def start(work, *args, size=2, method="fork"):
    "The processes, and the queue of what they give."
    context = multiprocessing.get_context(method)
    port, talk = free_port(), context.Queue()
    ranks = [context.Process(target=as_rank, args=(rank, port, talk, work, args)) for rank in range(size)]
    for rank in ranks: rank.start()
    return ranks, talk


def in_ranks(work, *args, size=2, method="fork"):
    "What a function gives in each rank, in order."
    ranks, talk = start(work, *args, size=size, method=method)
    try: found = dict(talk.get(timeout=100) for _ in ranks)
    finally:
        for rank in ranks:
            rank.join(20)
            if rank.is_alive(): rank.kill()
    return [found[rank] for rank in range(size)]


class Double(DWIMLTrainerOneInput):
    "Computes in double precision."
    def run_one_batch(self, batch):
        double = lambda r: r.with_data(r.data.double()) if isinstance(r, Ragged) else r
        batch = self.batch_loader.finish(batch.to(self.device)).apply(double)
        outputs = self.model(*map(self.spec.form, (*batch.inputs, batch.seen)))
        return self.spec.loss(self.model, outputs, self.spec.form(batch.targets), batch.ends, batch.left)


def make(study, folder, name, devices=1, resume=False, dtype="float32", cls=None, noise=0., dropout=0., batch_size=23, device="cpu", **options):
    dataset = MultiSubjectDataset(study).load_data()
    torch.manual_seed(0)
    model = Learn2TrackModel(dataset.nb_features["input"], rnn_key="gru", rnn_layer_sizes=[4], dropout=dropout, step_size=2.).to(getattr(torch, dtype))
    sampler = DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=batch_size, batch_size_validation=batch_size)
    loader = DWIMLBatchLoaderOneInput(dataset, model, "input", "bundles", noise_mm_forward=noise)
    cls = cls or (Double if dtype == "float64" else DWIMLTrainerOneInput)
    place = model, folder, name, sampler, loader
    if resume: return cls.init_from_checkpoint(*place, device=device, devices=devices, **options)
    few = dict(max_epochs=2, max_batches_per_epoch_training=4, max_batches_per_epoch_validation=2, learning_rates=[.01])
    return cls(*place, device=device, devices=devices, **{**few, **options})


@dwiml_model
class Levels(torch.nn.Module):
    "Tells lines apart by the image under them, with a step of its own; in double precision if its config says so."
    def __init__(self, config, data_sample):
        super().__init__()
        self.dtype = getattr(torch, config["model"]["Levels"]["dtype"])
        self.layers = torch.nn.Sequential(torch.nn.Linear(data_sample.shape[1], 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).to(self.dtype)
    def forward(self, batch): return self.layers(batch.to(self.dtype))
    def train_step(self, batch):
        self.optimizer.zero_grad()
        loss = self.criterion(self(batch), batch.argmax(1) % 3)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss}
    def validate_step(self, batch): return {"loss": self.criterion(self(batch), batch.argmax(1) % 3)}
    @staticmethod
    def to_tensor(data_dict): return np.stack([np.asarray(v).mean(0) for v in data_dict["data"]["input"]])


def make_registered(study, folder, name, devices=1, resume=False, dtype="float32", batch_size=23, **options):
    dataset = MultiSubjectDataset(study).load_data()
    groups = dict(streamline_group_name="bundles", input_group_name="input")
    torch.manual_seed(0)
    model = registered_model(Levels, {"model": {"Levels": {"dtype": dtype}}}, dataset, **groups)
    sampler = DWIMLBatchIDSampler(dataset, "bundles", batch_size_training=batch_size, batch_size_validation=batch_size)
    place = model, folder, name, sampler, RegisteredBatchLoader(dataset, model, **groups)
    if resume: return RegisteredTrainer.init_from_checkpoint(*place, device="cpu", devices=devices, **options)
    few = dict(max_epochs=2, max_batches_per_epoch_training=4, max_batches_per_epoch_validation=2, learning_rates=[.05], optimizer="Adam", weight_decay=0)
    return RegisteredTrainer(*place, device="cpu", devices=devices, **{**few, **options})


def train(make, *args, after=None, **options):
    "Train, and give the weights; `after` is called with the trainer, before."
    trainer = make(*args, **options)
    if after: after(trainer)
    trainer.train_and_validate()
    return {name: p.detach().clone().double().numpy() for name, p in trainer.model.named_parameters()}


def connected_train(size, kind, study, folder):
    "What connects the ranks, a sum of gradients by hand, and the weights after a training; on GPUs or CPUs."
    fabric = launched(size, device=kind)
    ranks, layer = Ranks(fabric), torch.nn.Linear(3, 2, device=fabric.device)
    with ranks.summing(layer): layer(torch.full((2, 3), 1., device=fabric.device)).sum().backward()
    assert ranks.gather(ranks.rank) == list(range(size))
    sums = layer.weight.grad.flatten().tolist()
    ranks.end_run()
    return torch.distributed.get_backend(), sums, train(make, study, folder, "connected", devices=fabric, device=kind)
