"""Rows for `shoot_widgets.py`: widgets that are mainly tables, curves or forms."""
from shoot_rows import STUDY, Row, press

MANY = """
import h5py, tempfile
from dwiml_nb.all import *
from dwiml_nb.study.headers import headers_in, write_index
path = toy_study(tempfile.mkdtemp())
with h5py.File(path, 'r+') as file:
    ids = [f'sub-{i:03}' for i in range(300)]
    ids[7] = 'sub-a_very_long_name_that_somebody_gave_ses-01_acq-2mm_run-2'
    for s in ids: file.copy('sub-02', s)
    file['sub-012/input/data'][3, 3, 2, 0] = float('nan')
    for name, some in (('training', ids[:200]), ('validation', ids[200:260]), ('testing', ids[260:])): file.attrs[f'{name}_subjs'] = some
    for s in ids: file[s]['bundles']['data_per_streamline']['bundle'] = [[float(k % 3)] for k in range(120)]
    write_index(file, {s: headers_in(file[s]) for s in ids})
"""
TRAINER = """
import time
def trainer_of(name, lr=1e-3, **how):
    return DWIMLTrainerOneInput(model=model, experiments_path=folder + '/runs', experiment_name=name, batch_sampler=sampler, batch_loader=loader, learning_rates=[lr], **how)
"""
RUNS = TRAINER + "for name, lr, epochs in (('plain', 1e-3, 6), ('fast', 3e-3, 4)): trainer_of(name, lr, max_epochs=epochs).train_and_validate()"
RUN_FILE = """
from pathlib import Path
import tempfile
from dwiml_nb.all import *
folder = Path(tempfile.mkdtemp())
toy_study(folder)
(folder/'run.toml').write_text('''[data]
hdf5_file = "study.hdf5"
input_group_name = "wm_mask"
streamline_group_name = "bundles"
[model]
rnn_layer_sizes = [8]
step_size = 2.0
[training]
experiment_name = "first"
max_epochs = 3
max_batches_per_epoch_training = 2
max_batches_per_epoch_validation = 1
device = "cpu"
''')
"""
QUICK = """
import subprocess, tempfile
from pathlib import Path
from dwiml_nb.all import *
out = Path(tempfile.gettempdir())/'dwiml_quick_demo'
if not (out/'report.html').is_file(): subprocess.run(['dwiml_demo', '--quick', '--out', str(out)], check=True)
"""
DEMO = """
import json, tempfile
from pathlib import Path
from dwiml_nb.all import *
from dwiml_nb.training.sinks import ExperimentLogs
out = Path(tempfile.mkdtemp())
dataset = MultiSubjectDataset(toy_study(out), lazy=True).load_data()
truth = dataset.testing.subject(0).streamlines['bundles'].as_tractogram()
save_tractogram(Tractogram([*truth.lines.unbind(), *(line[:4] for line in truth.lines.unbind()[:9])], truth.grid), out/'tractogram.trx')
save_tractogram(Tractogram(truth.lines[::2], truth.grid), out/'csd.trx')
(out/'scores.json').write_text(json.dumps({'held_out': dataset.testing.subjects[0]}))
logs = ExperimentLogs(out/'experiments'/'learn2track'/'logs'); logs.folder.mkdir(parents=True)
for epoch in range(6): logs.epochs.write({'epoch': epoch, 'train_loss': 1/(1 + epoch), 'valid_loss': .9/(1 + epoch)})
logs.close()
"""


def until(page, so, seconds=90):
    for _ in range(5*seconds):
        if so(): return
        page.wait_for_timeout(200)
    raise TimeoutError("waited in vain")


def look(page, widget, shoot):
    until(page, lambda: widget.locator("table.dataTable tbody svg").count() > 3)
    widget.locator("table.dataTable tbody tr").nth(1).locator("td").nth(1).click()
    until(page, lambda: "PNG" in widget.inner_text())
    page.wait_for_timeout(3000)
    shoot("looked")
    press(page, widget, "Code")
    press(page, widget, "Lengths")
    shoot("lengths")


def search(page, widget, shoot):
    until(page, lambda: widget.locator("table.dataTable tbody svg").count() > 3)
    widget.locator(".dt-search input").fill("sub-01")
    page.wait_for_timeout(1500)
    widget.locator("table.dataTable tbody tr", has_text="sub-012").locator("td").nth(1).click()
    page.wait_for_timeout(4000)
    shoot("problem")
    press(page, widget, "Leave out")
    press(page, widget, "Check all")
    field = widget.get_by_placeholder("length_mm >= 20, …")
    field.fill("bundle == 1, nonsense > 2")
    field.press("Enter")
    page.wait_for_timeout(1500)
    shoot("refused")
    press(page, widget, "Lengths")


def steer(page, widget, shoot):
    press(page, widget, "Start")
    until(page, lambda: "best epoch 3" in widget.inner_text())
    press(page, widget, "Pause")
    shoot("paused")
    widget.get_by_placeholder("0.0001").fill("fast")
    press(page, widget, "Set learning rate")
    shoot("refused")
    widget.get_by_placeholder("0.0001").fill("0.0005")
    press(page, widget, "Set learning rate")
    press(page, widget, "Go on")
    press(page, widget, "Checkpoint now")
    until(page, lambda: "a checkpoint was saved" in widget.inner_text())
    for after in ("batch", "epoch"):
        press(page, widget, f"Stop after {after}")
        until(page, lambda: "stopped: epoch" in widget.inner_text())
        shoot(f"stopped-{after}")
        if after == "batch": press(page, widget, "Go on")
    page.mouse.click(*widget.locator(".js-plotly-plot").evaluate("""g => { const t = g._fullData.find(o => o.name == 'training batches')
        const i = t.y.length - 2, b = g.getBoundingClientRect(), { xaxis, yaxis } = g._fullLayout
        return [b.left + xaxis._offset + xaxis.c2p(t.x[i]), b.top + yaxis._offset + yaxis.c2p(t.y[i])] }"""))
    page.wait_for_timeout(6000)
    shoot("batch")


def compare(page, widget, shoot):
    page.wait_for_timeout(2000)
    press(page, widget, "log scale")
    widget.get_by_label("over").first.select_option("batches")
    shoot("log")


def tabs(page, widget, shoot):
    tab = lambda name: (widget.locator(".lm-TabBar-tabLabel").get_by_text(name, exact=True).click(), page.wait_for_timeout(2500))
    tab("Batches")
    shoot("batches")
    press(page, widget, "Write")
    tab("Training")
    press(page, widget, "Start")
    until(page, lambda: "ended" in widget.inner_text())
    shoot("trained")


def link(page, widget, shoot):
    until(page, lambda: widget.locator("canvas.dwiml-picture").count() == 3)
    page.wait_for_timeout(3000)
    widget.get_by_label("bundle").first.select_option(index=1)
    page.wait_for_timeout(2500)
    shoot("bundle")
    box = widget.get_by_placeholder("any", exact=True)
    box.fill("26")
    box.press("Enter")
    page.wait_for_timeout(2500)
    widget.locator("table.dataTable tbody tr").first.locator("td").nth(1).click()
    page.wait_for_timeout(4000)
    shoot("subject")


FORMS = {
    "study": Row((STUDY, "StudyBrowser(dataset)"), look),
    "study_300": Row((MANY, "StudyBrowser(path)"), search),
    "dashboard": Row((STUDY, TRAINER + "trainer = trainer_of('run', max_epochs=500); trainer.control.on_batch_end.append(lambda row: time.sleep(.05))",
                      "TrainingDashboard(trainer)"), steer),
    "experiment": Row((STUDY, RUNS, "viz(folder + '/runs/plain')")),
    "experiments": Row((STUDY, RUNS, "viz(folder + '/runs')"), compare),
    "run_panel": Row((RUN_FILE, "viz(folder/'run.toml')"), tabs),
    "model": Row((STUDY, "viz(Learn2TrackModel(dataset.nb_features['input'], step_size=1., neighborhood_type='axes', neighborhood_radius=1, neighborhood_resolution=1, rnn_layer_sizes=[32]))")),
    "scores": Row((DEMO, "from dwiml_nb.evaluation.bundles import load_reference\nviz(score_tractogram(load_tractogram(out/'tractogram.trx').lines, load_reference(out/'subjects'/dataset.testing.subjects[0])))")),
    "demo": Row((DEMO, "viz(out)"), link),
    "demo_quick": Row((QUICK, "board = viz(out); board.to_html('demo_quick.html'); board"), link, 600),
    "report": Row((QUICK, "from dwiml_nb.widgets.report import report_run\nrun, = (out/'experiments').iterdir()\n"
                   "report_run(run, 'report.html', [out/'scores.json'], [out/'tractogram.trx', out/'csd.trx'], out/'subjects'/'sub_5')"), None, 600),
}
