"""The figures of a sweep in JupyterLab, and its page in a browser: drawn, without another machine."""
import json
from pathlib import Path
from urllib.parse import urlparse

import pytest
from conftest import errors

import dwiml_nb.runs.sweeps as sweeps
from dwiml_nb.study.toy import toy_study

pytestmark = pytest.mark.browser
SCREENSHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"
RUN = """
data = {hdf5_file = "study.hdf5", input_group_name = "input", streamline_group_name = "bundles"}
model = {name = "Learn2TrackModel", rnn_layer_sizes = [4], step_size = 2.0}
training = {experiment_name = "small"}
[sweep]
trials = 12
sampler = "random"
space = {optimizer = {lr = {low = 1e-4, high = 0.1, log = true}}, model = {dropout = [0.0, 0.2], rnn_key = ["gru", "lstm"]}}
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    "A sweep whose trials are made up."
    folder = tmp_path_factory.mktemp("swept")
    toy_study(folder)
    (folder / "run.toml").write_text(RUN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "train_trial", lambda trial, *args: ("COMPLETE", trial.params["optimizer.lr"] + trial.params["model.dropout"]))
        sweeps.sweep(folder / "run.toml")
    return folder / "experiments" / "small"


def test_the_figures_of_a_sweep(browser, lab, swept):
    cells = [f"from dwiml_nb.runs.sweeps import sweep_figures\nfigures = sweep_figures({str(swept)!r})", *(f"figures[{name!r}]" for name in ("history", "parallel", "importance"))]
    content = [{"cell_type": "code", "id": f"cell-{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": cell} for i, cell in enumerate(cells)]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    (lab.folder / "sweep.ipynb").write_text(json.dumps({"cells": content, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}))
    page = lab.open(browser, "sweep.ipynb", own_kernel=False)
    lab.run_all(page)
    page.wait_for_function("document.querySelectorAll('.jp-OutputArea .js-plotly-plot .main-svg').length >= 3")
    texts = page.locator(".jp-OutputArea .js-plotly-plot").all_text_contents()
    assert len(texts) == 3 and "rnn_key" in texts[1] and "optimizer.lr" in texts[2] and not errors(page)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "sweep_lab.png")
    lab.leave(page)


def test_the_page_of_a_sweep(browser, swept):
    path = sweeps.write_sweep_page(swept, swept / "sweep.html")
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 3")
    assert page.locator("tr").count() == 13 and {urlparse(url).scheme for url in asked} <= {"file", "data", "blob"}
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / "sweep_page.png")
    page.close()
