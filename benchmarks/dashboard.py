"""How free a notebook is beside a dashboard, in a JupyterLab with a real browser: `python benchmarks/dashboard.py`.

Seconds that a cell `print(1+1)` takes from the key to its answer on the page: without a dashboard, while one trains, while another one watches a training
of another process. Then how memory grows while a dashboard draws: of the kernel and of the browser, from 1,000 batches to the end.
Nothing is asserted: the figures depend on the machine and on who else uses it, so the load is printed beside them.
"""
import argparse
import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "browser"))
from test_widgets import time_of_a_cell  # noqa: E402
from viewers import fixtures, resident, run_cell  # noqa: E402

SETUP = """
import subprocess, sys, tempfile, time, psutil, torch
torch.set_num_threads(1)
from dwiml_nb.all import *
folder = tempfile.mkdtemp()
dataset = MultiSubjectDataset(toy_study(folder)).load_data()
model = Learn2TrackModel(dataset.nb_features['input'], step_size=1., rnn_key='gru', rnn_layer_sizes=[32])
sampler = DWIMLBatchIDSampler(dataset, 'bundles', batch_size_training=10)
loader = DWIMLBatchLoaderOneInput(dataset, model, 'input', 'bundles')
trainer_of = lambda name, epochs: DWIMLTrainerOneInput(model=model, experiments_path=folder, experiment_name=name, batch_sampler=sampler, batch_loader=loader, max_epochs=epochs)
trainer_of('other', 1).train_and_validate()
OTHER = "import sys; from dwiml_nb.all import *; trainer_from_folder(sys.argv[1], 'other', new_max_epochs=10000).train_and_validate()"
go = False
def begin(): dashboard.start(); time.sleep(8)
def told(): print('at', len(dashboard.run.log.phases['training']), psutil.Process().memory_info().rss/1e6)
def change():
    global other
    dashboard.stop(); dashboard.wait(30); dashboard.close()
    other = subprocess.Popen([sys.executable, '-c', OTHER, folder]); time.sleep(15)
def end(): print(watching.state, len(watching.run.log.phases['training'])); other.kill()
"""
CELLS = ["dashboard = TrainingDashboard(trainer_of('run', 10000)); dashboard", "print('at', time.time())", "go and begin()", "go and told()", "go and change()",
         "watching = TrainingDashboard(folder + '/other') if go else None; watching", "go and end()", "go = True"]


def opened(lab, browser, name, cells):
    "A page with these cells, run."
    kernelspec = {"display_name": "python3", "language": "python", "name": "python3"}
    content = [{"cell_type": "code", "id": f"cell-{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": c.strip()}
               for i, c in enumerate(cells)]
    (lab.folder / name).write_text(json.dumps({"cells": content, "metadata": {"kernelspec": kernelspec}, "nbformat": 4, "nbformat_minor": 5}))
    page = lab.open(browser, name)
    lab.run_all(page, timeout=300)
    return page


def answers(page, i, many=15):
    "Median and longest seconds of a cell's answer."
    seconds = [time_of_a_cell(page, i) for _ in range(many)]
    return f"median {statistics.median(seconds):.3f} s, longest {max(seconds):.3f} s (load {os.getloadavg()[0]:.1f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=3000, help="of the training whose memory is measured")
    batches = parser.parse_args().batches
    with fixtures(False) as (lab, browser, process):
        page = opened(lab, browser, "dashboard.ipynb", [SETUP, *CELLS])
        print("alone:", answers(page, 2))
        run_cell(page, 3)
        print("while a dashboard trains:", answers(page, 2))
        count = lambda: [float(o) for o in run_cell(page, 4).split()[1:]]
        while count()[0] < 1000: page.wait_for_timeout(500)
        (n0, kernel0), browser0 = count(), resident(process)
        while count()[0] < batches: page.wait_for_timeout(500)
        (n1, kernel1), browser1 = count(), resident(process)
        print(f"batches {n0:.0f} to {n1:.0f}: kernel {kernel0:.0f} to {kernel1:.0f} MB, browser {browser0:.0f} to {browser1:.0f} MB")
        for i in (5, 6): run_cell(page, i)
        print("while a dashboard watches another process:", answers(page, 2))
        print(run_cell(page, 7))


if __name__ == "__main__": main()
