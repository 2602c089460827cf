"""Train a model of your own: copy this file, change the model and the options, and run it.

    python train_model.py study.hdf5 experiments first
    python train_model.py study.hdf5 experiments first --resume

The last line of `main` writes the run as a file. From there on a shell does the same, bit for bit:

    dwiml_train run.toml training.experiment_name=second --trust train_model.py
"""
import argparse

import torch
from torch import nn

from dwiml_nb.all import (DWIMLBatchIDSampler, DWIMLBatchLoaderOneInput, DWIMLTrainerOneInput, MainModelAbstract, MultiSubjectDataset,
                          as_ragged, seed_all, write_run_file)


class MyModel(MainModelAbstract):
    "The direction at each point, from the volume there: one hidden layer."
    accepts_ragged = True           # lines and inputs come as one tensor with offsets; leave this out to get lists

    def __init__(self, nb_features: int, hidden: int = 32, step_size: float = 1.0):
        super().__init__(step_size=step_size)
        self.layers = nn.Sequential(nn.Linear(nb_features, hidden), nn.ReLU(), nn.Linear(hidden, 3))

    def forward(self, inputs, streamlines):
        return as_ragged(inputs).with_data(self.layers(as_ragged(inputs).data))

    def compute_loss(self, outputs, target_streamlines):
        lines = as_ragged(target_streamlines)
        last = torch.zeros(len(lines.data), dtype=torch.bool, device=lines.data.device)
        last[lines.offsets[1:] - 1] = True                                # the last point of a line has no direction
        steps = (lines.data[1:] - lines.data[:-1])[~last[:-1]]
        said = outputs.data[~last]
        return 1 - torch.cosine_similarity(said, steps).mean(), len(steps)


def main(words=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("hdf5_file", "experiments_path", "experiment_name"): p.add_argument(name)
    p.add_argument("--input_group", default="input")
    p.add_argument("--streamline_group", default="bundles")
    p.add_argument("--max_epochs", type=int, default=10)
    p.add_argument("--resume", action="store_true")
    p.add_argument("--write", help="also write the run as a file")
    args = p.parse_args(words)

    dataset = MultiSubjectDataset(args.hdf5_file).load_data()
    seed_all(1234)                                                        # then, in this order: model, sampler, loader, trainer
    model = MyModel(dataset.nb_features[args.input_group])
    sampler = DWIMLBatchIDSampler(dataset, args.streamline_group)
    loader = DWIMLBatchLoaderOneInput(dataset, model, args.input_group, args.streamline_group, reverse_ratio=.5)
    parts = model, args.experiments_path, args.experiment_name, sampler, loader
    if args.resume: trainer = DWIMLTrainerOneInput.init_from_checkpoint(*parts, new_max_epochs=args.max_epochs)
    else: trainer = DWIMLTrainerOneInput(*parts, learning_rates=[1e-3], max_epochs=args.max_epochs, max_batches_per_epoch_training=100)
    if args.write: write_run_file(trainer, args.write)
    trainer.train_and_validate()
    return trainer


if __name__ == "__main__": main()
