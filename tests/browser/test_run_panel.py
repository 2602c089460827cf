"""A run file opened in JupyterLab: another choice, the file written, some training, the table of runs; light and dark."""
import pytest

from dwiml_nb.core.config import read_toml
from test_widgets import errors, notebook, nothing_from_elsewhere, output, shot, wait_until  # noqa: F401  (a fixture, too)

pytestmark = pytest.mark.browser

SETUP = """
import tempfile
from pathlib import Path
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


def test_a_run_file_as_widgets(notebook, lab):  # noqa: F811 - a fixture
    page = notebook("runs.ipynb", SETUP, "panel = viz(folder/'run.toml'); panel", "from dwiml_nb.runs.table import runs_table; runs_table(folder/'experiments') if panel.dashboard.trainer.epoch else None", "panel.config['data']['input_group_name'], str(folder)")
    widget = output(page, 1)
    wait_until(lambda: "wm_mask" in widget.inner_text(), said=widget.inner_text)
    shot(widget, "run_panel_study")
    widget.locator("select", has_text="seed_mask").first.select_option("input")
    wait_until(lambda: widget.get_by_role("button", name="Write").is_visible())
    tab = lambda name: widget.locator(".lm-TabBar-tabLabel, .p-TabBar-tabLabel").get_by_text(name, exact=True).click()
    tab("Batches")
    wait_until(lambda: "batch 1 of" in widget.inner_text())
    shot(widget, "run_panel_batches")
    widget.get_by_label("Run file").fill("chosen.toml")
    widget.get_by_role("button", name="Write").click()
    wait_until(lambda: "dwiml_train chosen.toml" in widget.inner_text(), said=widget.inner_text)
    assert read_toml(lab.folder / "chosen.toml")["data"]["input_group_name"] == "input"
    widget.get_by_role("button", name="Write").click()
    wait_until(lambda: "of that name already" in widget.inner_text())
    tab("Training")
    widget.get_by_role("button", name="Start").click()
    wait_until(lambda: "ended" in widget.inner_text(), 60, said=widget.inner_text)
    shot(widget, "run_panel_trained")
    tab("Study")
    widget.locator("select", has_text="seed_mask").first.select_option("seed_mask")
    wait_until(lambda: "this run was begun with" in widget.inner_text(), said=widget.inner_text)
    run(page, 2)
    table = output(page, 2)
    wait_until(lambda: "first" in table.inner_text() and "3 of 3" in table.inner_text(), said=table.inner_text)
    shot(table, "runs_table")
    theme(page, "Dark")
    shot(table, "runs_table_dark")
    tab("Training")
    shot(widget, "run_panel_dark")
    theme(page, "Light")
    assert not errors(page)
    nothing_from_elsewhere(page)


def run(page, i):
    page.locator(".jp-Notebook .jp-Cell").nth(i).locator(".jp-InputArea-editor").click()
    page.keyboard.press("Control+Enter")


def theme(page, name):
    "Another theme, which JupyterLab remembers."
    page.click('text="Settings"')
    page.click('.lm-Menu-itemLabel:text-is("Theme")')
    page.click(f'.lm-Menu-itemLabel:text-is("JupyterLab {name}")')
    page.wait_for_selector(f'body[data-jp-theme-light="{str(name == "Light").lower()}"]', state="attached")
