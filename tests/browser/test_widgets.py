"""Pages and widgets in a real JupyterLab, used with a mouse. Screenshots of each go to build/screenshots, to be looked at.

Where files run two at a time, all files of this folder run one after the other (conftest.py): one browser, one JupyterLab, and one kernel but
for the tests that need their own.
"""
import json
import os
import signal
import time
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
from conftest import errors

pytestmark = pytest.mark.browser
SCREENSHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"

SETUP = """
import ipywidgets, tempfile, torch
ipywidgets.Widget.close_all()
from dwiml_nb.all import *
folder = tempfile.mkdtemp()
dataset = MultiSubjectDataset(toy_study(folder)).load_data()
torch.manual_seed(0)
model = Learn2TrackModel(dataset.nb_features['input'], step_size=1., rnn_key='gru', rnn_layer_sizes=[32])
sampler = DWIMLBatchIDSampler(dataset, 'bundles', batch_size_training=40)
loader = DWIMLBatchLoaderOneInput(dataset, model, 'input', 'bundles', off_track_mm=1.)
"""


@pytest.fixture
def notebook(browser, lab):
    "A function that opens a new notebook with these cells, each run; it also notes every address that the page asks for."
    opened = []

    def open_cells(name, *cells, own_kernel=False):
        kernelspec = {"display_name": "python3", "language": "python", "name": "python3"}
        content = [{"cell_type": "code", "id": f"cell-{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": cell.strip()} for i, cell in enumerate(cells)]
        (lab.folder / name).write_text(json.dumps({"cells": content, "metadata": {"kernelspec": kernelspec}, "nbformat": 4, "nbformat_minor": 5}))
        page = lab.open(browser, name, own_kernel=own_kernel)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        lab.run_all(page)
        opened.append(page)
        return page

    yield open_cells
    for page in opened: lab.leave(page)


def shot(where, name):
    "Keep a picture of a page or a part of it."
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    where.screenshot(path=SCREENSHOTS / f"{name}.png")


def pixels(where):
    "A picture of a page or a part of it, as numbers."
    from io import BytesIO
    from PIL import Image
    from playwright.sync_api import Error
    for _ in range(10):
        try: taken = where.screenshot(); break
        except Error as e:                              # another picture took its place meanwhile
            if "not attached" not in str(e): raise
    return np.asarray(Image.open(BytesIO(taken)).convert("RGB")).astype(int)


def nothing_from_elsewhere(page):
    "Nothing was loaded from another machine."
    hosts = {urlparse(url).hostname for url in page.asked if url.startswith(("http", "ws"))}
    assert hosts <= {"127.0.0.1", None}, hosts


def output(page, i): return page.locator(".jp-Notebook .jp-Cell").nth(i).locator(".jp-Cell-outputArea")


def test_errors_are_seen(notebook):
    page = notebook("errors.ipynb", "import ipywidgets, sys\nprint('fine', file=sys.stderr); 1", "with (shown := ipywidgets.Output()): 1/0\nshown", "x = = 1", "'not run'")
    wait_until(lambda: len(errors(page)) == 2, said=lambda: errors(page))
    assert [len(errors(output(page, i))) for i in range(4)] == [0, 1, 1, 0] and "SyntaxError" in errors(output(page, 2))[0]


def test_study_browser(notebook, lab):
    page = notebook("browser.ipynb", SETUP, "browser = StudyBrowser(dataset); browser", "browser.choice, browser.subset")
    widget = output(page, 1)
    wait_until(lambda: "sub-01" in widget.inner_text() and "1 to 4 of 4" in widget.inner_text())
    widget.get_by_role("button", name="validation").click()
    page.wait_for_function("() => document.body.innerText.includes('sub-03')")
    widget.get_by_role("button", name="Lengths").click()
    widget.locator("img.jupyter-widgets").wait_for(timeout=20_000)
    shot(widget, "study_browser_lengths")
    widget.get_by_role("button", name="Look").click()
    page.wait_for_function("() => document.body.innerText.includes('PNG')", timeout=60_000)
    view = widget.locator("canvas.dwiml-picture")
    wait_until(lambda: len(np.unique(pixels(view).reshape(-1, 3), axis=0)) > 50)
    shot(widget, "study_browser_look")
    widget.get_by_role("button", name="training").click()
    page.wait_for_function("() => document.body.innerText.includes('lines of bundles of sub-01, over input of sub-01')")
    for subject in ("sub-02", "sub-01", "sub-02"): widget.locator("table.dataTable td", has_text=subject).click()
    page.wait_for_function("() => document.body.innerText.includes('lines of bundles of sub-02, over input of sub-02')")
    page.wait_for_timeout(500)  # the last of the quick choices is drawn
    with page.expect_download(timeout=30_000) as kept: widget.get_by_role("button", name="PNG").click()
    assert kept.value.suggested_filename.startswith("120_of_120_lines_of_bundles_of_sub") and Path(kept.value.path()).stat().st_size > 10_000
    shot(widget, "study_browser_chosen")
    assert not errors(page)
    nothing_from_elsewhere(page)


@pytest.mark.fury
def test_batch_preview_turns_with_the_mouse(notebook):
    page = notebook("preview.ipynb", SETUP, "preview = BatchPreview(loader, sampler); preview.viewer.rung = 'live'; preview", "preview.viewer.rung",
                    "print('at', __import__('time').time(), 'frames', preview.viewer.face.frames)")
    assert "live" in output(page, 2).inner_text(), output(page, 2).inner_text()
    widget, canvas = output(page, 1), output(page, 1).locator(".dwiml-canvas").first
    canvas.wait_for(timeout=60_000)
    wait_until(lambda: len(np.unique(pixels(canvas).reshape(-1, 3), axis=0)) > 50)
    shot(widget, "batch_preview")
    frames = lambda: (time_of_a_cell(page, 3), output(page, 3).inner_text().split()[-1])[1]
    wait_until(lambda: (frames(), page.wait_for_timeout(2000))[0] == frames(), said=lambda: "an idle canvas draws nothing")
    still = lambda: output(page, 1).locator("[class^=dwiml-still] img").first.get_attribute("src")
    kept = still()
    before, box = pixels(canvas), canvas.bounding_box()
    page.evaluate("() => { window.ended = 0; document.addEventListener('pointercancel', () => { ended++ }, true) }")
    page.evaluate("() => getSelection().selectAllChildren(document.querySelector('.dwiml-canvas'))")  # as a drag before may have left it
    page.mouse.move(box["x"] + 300, box["y"] + 225)
    page.mouse.down()
    for k in range(10): page.mouse.move(box["x"] + 300 + 15 * k, box["y"] + 225 + 5 * k); page.wait_for_timeout(40)
    page.mouse.up()
    assert page.evaluate("() => ended") == 0
    wait_until(lambda: (pixels(canvas) != before).any(2).mean() > .02)
    shot(widget, "batch_preview_turned")
    wait_until(lambda: still() != kept)  # what a saved notebook shows has been turned, too
    turned = pixels(canvas)
    widget.get_by_role("button", name="Next batch").click()
    page.wait_for_function("() => document.body.innerText.includes('batch 2 of')")
    wait_until(lambda: (pixels(canvas) != turned).any(2).mean() > .005)
    widget.get_by_role("button", name="axial").click()
    page.wait_for_timeout(1500)
    shot(widget, "batch_preview_axial")
    assert not errors(page)
    nothing_from_elsewhere(page)


def test_without_an_adapter_there_is_a_picture_with_sliders(notebook):
    page = notebook("painted.ipynb", "import os; os.environ['VK_ICD_FILENAMES'] = os.environ['VK_DRIVER_FILES'] = '/none'", SETUP, "viewer = viz(loader).viewer; viewer.rung = 'painter'; viewer", "viewer.rung", "viewer.azimuth = 120.", own_kernel=True)
    widget = output(page, 2)
    assert "painter" in output(page, 3).inner_text()
    picture = widget.locator("img:visible")
    wait_until(lambda: "sudo apt install libvulkan1 mesa-vulkan-drivers" in widget.inner_text() and picture.count() == 1, said=widget.inner_text)
    shot(widget, "painted")
    before = pixels(picture)
    widget.get_by_role("button", name="coronal").click()
    wait_until(lambda: (pixels(picture) != before).any(2).mean() > .02)
    assert not errors(page)
    nothing_from_elsewhere(page)


def test_a_saved_notebook_keeps_its_pictures_without_a_kernel(notebook, browser, lab):
    page = notebook("kept.ipynb", SETUP + """
import time
from dwiml_nb.core.files import progress
trainer = DWIMLTrainerOneInput(model=model, experiments_path=folder, experiment_name='run', batch_sampler=sampler, batch_loader=loader, max_epochs=2)""",
                    "browser = StudyBrowser(dataset); browser.look(); browser", "preview = BatchPreview(loader, sampler); preview", "dashboard = TrainingDashboard(trainer); dashboard",
                    "for _ in progress(range(4), 'counting'): time.sleep(.3)", "dashboard.start(); dashboard.wait()", "loss_figure(read_logs(trainer.experiment_folder))",
                    "import os; print('kernel', os.getpid())", own_kernel=True)
    file, stills = lab.folder / "kept.ipynb", page.locator("[class^=dwiml-still]")
    output(page, 2).get_by_role("button", name="Next batch").click()
    page.wait_for_function("() => document.body.innerText.includes('training batch 2 of')")
    wait_until(lambda: "from three sides" in stills.first.inner_html())
    kept = lambda: [still.inner_html() for still in stills.all()]
    wait_until(lambda: len(kept()) == 3 and "training batch 2 of" in kept()[1] and "ended: epoch 2 of 2" in kept()[2], said=kept)
    wait_until(lambda: not any(still.is_visible() for still in stills.all()), said=lambda: "a still is hidden as long as its widget lives")
    assert not errors(page)
    shot(page, "kept_alive")
    page.click('text="File"')
    page.click('.lm-Menu-itemLabel:text-is("Save Notebook")')
    wait_until(lambda: '"kernel ' in (text := file.read_text()) and text.endswith("}\n"))  # written as a whole
    text = file.read_text()
    assert "training batch 2 of" in text and "ended: epoch 2 of 2" in text and "counting" not in str(json.loads(text)["cells"][4]["outputs"])

    os.kill(int(output(page, 7).inner_text().split()[-1]), signal.SIGKILL)
    page.wait_for_function("() => [...document.querySelectorAll('.dwiml-gone')].filter(o => o.offsetParent).length == 3", timeout=20_000)
    page.keyboard.press("Enter")  # JupyterLab says it too
    assert "trainer_from_folder(" in output(page, 3).inner_text() or "init_from_checkpoint" in output(page, 3).inner_text()
    output(page, 3).scroll_into_view_if_needed()
    shot(page, "kept_kernel_gone")
    page.close()

    page = browser.new_page()
    page.set_viewport_size({"width": 1400, "height": 3000})
    page.route("**/api/sessions*", lambda route: route.abort() if route.request.method == "POST" else route.continue_())
    page.route("**/api/kernels*", lambda route: route.abort() if route.request.method == "POST" else route.continue_())
    for session in lab.ask("sessions", method="GET"):
        if session["path"] == "kept.ipynb": lab.ask(f"sessions/{session['id']}", method="DELETE")
    page.goto(f"{lab.url}/lab/workspaces/kept/tree/kept.ipynb", wait_until="domcontentloaded")
    page.locator(".jp-Notebook [class^=dwiml-still]").nth(2).wait_for(timeout=60_000)
    for _ in range(10):  # longer than JupyterLab looks for a widget; meanwhile it may ask for a kernel, or say that there is none
        if (buttons := page.locator(".jp-Dialog button")).count(): (no if (no := buttons.filter(has_text="No Kernel")).count() else buttons).last.click()
        page.wait_for_timeout(500)
    shot(page, "kept_reopened")
    words = page.locator(".jp-Notebook").inner_text()
    assert "model not found" not in words and "Loading widget" not in words, words
    assert "training batch 2 of" in words and "ended: epoch 2 of 2" in words
    pictures = page.locator("[class^=dwiml-still] img")
    assert pictures.count() >= 5 and all(picture.is_visible() and picture.evaluate("o => o.naturalWidth") > 300 for picture in pictures.all())
    assert pictures.and_(page.get_by_alt_text("sub-01 from three sides")).count() == 1, "what came from the background is kept, too"
    assert output(page, 4).inner_text().strip() == "", "nothing is left of the progress bar"
    assert output(page, 4).locator(".jp-OutputArea-child:visible").count() == 0, "nor a blank line in its place"
    assert output(page, 6).locator("img, svg.main-svg").first.is_visible(), "a figure of plotly's (its extension keeps a picture)"
    page.close()


def test_the_first_hour(browser, lab):
    file = lab.folder / "tutorials/00_first_hour.ipynb"
    text = file.read_text()
    assert "max_epochs=60" in text and "trainer.epoch < 20" in text  # a third of them: the whole of it runs with the pages
    file.write_text(text.replace("max_epochs=60", "max_epochs=20").replace("trainer.epoch < 20", "trainer.epoch < 6"))
    page = lab.open(browser, "tutorials/00_first_hour.ipynb", height=1400, own_kernel=False)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    lab.run_all(page, timeout=240)
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt").all_text_contents()
    assert not errors(page) and prompts and all(prompt.strip("[]: ") for prompt in prompts), "every code cell has run"
    page.locator(".jp-OutputArea-output img").first.wait_for()
    cells = page.locator(".jp-Notebook .jp-CodeCell")
    for i in range(cells.count()):
        shown = cells.nth(i).locator(".jp-OutputArea-output")
        if not shown.count(): continue
        cells.nth(i).scroll_into_view_if_needed()
        page.wait_for_timeout(300)
        shot(cells.nth(i), f"first_hour_{i:02d}")
    nothing_from_elsewhere(page)
    lab.leave(page)


def wait_until(condition, seconds=60, said=lambda: ""):
    "Look again and again until something is so; the machine may be busy."
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"waited in vain {said()}"
        time.sleep(.2)


def time_of_a_cell(page, i):
    "Seconds from running a cell, which prints the time after 'at', to seeing its answer."
    cell = page.locator(".jp-Notebook .jp-Cell").nth(i)
    cell.locator(".jp-InputArea-editor").click()
    before = output(page, i).inner_text()
    return page.evaluate("""async ([i, before]) => {
        const cell = document.querySelectorAll('.jp-Notebook .jp-Cell')[i];
        const begun = performance.now(), stamp = text => text.match(/at ([0-9.]+)/)?.[1];
        document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', code: 'Enter', keyCode: 13, ctrlKey: true, bubbles: true, cancelable: true}));
        while (performance.now() - begun < 60000) {
            const text = cell.querySelector('.jp-OutputArea')?.innerText ?? '';
            if (stamp(text) && stamp(text) !== stamp(before)) break;
            await new Promise(done => setTimeout(done, 10));
        }
        return (performance.now() - begun)/1000;
    }""", [i, before])
