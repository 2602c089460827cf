"""A training is started, steered, resumed and watched by mouse, while the notebook stays free."""
import pytest
from test_widgets import SETUP, errors, nothing_from_elsewhere, notebook, output, shot, time_of_a_cell, wait_until  # noqa: F401  (a fixture, too)

pytestmark = pytest.mark.browser
POINTS = """() => document.querySelector('.js-plotly-plot').data.find(o => o.name == 'validation')?.y?.length ?? 0"""


def test_training_dashboard_and_a_free_notebook(notebook):  # noqa: F811
    page = notebook("dashboard.ipynb", SETUP, """
import time
trainer = DWIMLTrainerOneInput(model=model, experiments_path=folder, experiment_name='run', batch_sampler=sampler, batch_loader=loader, max_epochs=500)
trainer.control.on_batch_end.append(lambda row: time.sleep(.03))  # or it would train hundreds of epochs while the mouse moves
dashboard = TrainingDashboard(trainer); dashboard""", "import time; print('at', time.time(), dashboard.state, trainer.learning_rate(trainer.epoch, 0))",
                    "second = TrainingDashboard(trainer.experiment_folder) if trainer.experiment_folder.exists() else None; second")
    widget, second = output(page, 1), output(page, 3)
    press = lambda name: widget.get_by_role("button", name=name).click()
    said = lambda *words: wait_until(lambda: all(word in widget.inner_text() for word in words), said=widget.inner_text)
    widget.locator(".js-plotly-plot").wait_for(timeout=60_000)
    press("Start")
    wait_until(lambda: page.evaluate(POINTS) >= 3, 60)
    print("a cell answers in", [round(time_of_a_cell(page, 2), 2) for _ in range(3)])  # benchmarks/dashboard.py measures it
    assert any(word in output(page, 2).inner_text() for word in ("training", "validating", "saving")), "while it trains"
    shot(widget, "dashboard_running")
    wide = widget.locator(".main-svg").first.evaluate("o => o.clientWidth")
    page.set_viewport_size({"width": 1100, "height": 1000})
    wait_until(lambda: wide - 400 < widget.locator(".main-svg").first.evaluate("o => o.clientWidth") < wide - 200)
    page.set_viewport_size({"width": 1400, "height": 1000})
    press("Pause")
    said("paused before")
    widget.get_by_placeholder("0.0001").fill("0.0005")
    press("Set learning rate")
    said("the learning rate is 0.0005 from")
    press("Go on")
    said("goes on with")
    press("Stop after epoch")
    said("stopped; its checkpoint is saved", "stopped: epoch")
    wait_until(lambda: (time_of_a_cell(page, 2), output(page, 2).inner_text().split()[-1])[1] == "0.0005")
    drawn = page.evaluate(POINTS)
    page.locator(".jp-Notebook .jp-Cell").nth(3).locator(".jp-InputArea-editor").click()
    page.keyboard.press("Control+Enter")
    second.get_by_role("button", name="Go on").wait_for(timeout=30_000)
    press("Go on")
    wait_until(lambda: page.evaluate(POINTS) > drawn + 1, 60)
    wait_until(lambda: "running: epoch" in second.inner_text(), said=second.inner_text)
    shot(second, "dashboard_watching")
    second.get_by_role("button", name="Stop after batch").click()
    said("stopped: epoch")
    wait_until(lambda: "stopped: epoch" in second.inner_text() and "stops before" in second.inner_text(), said=second.inner_text)
    shot(widget, "dashboard_stopped")
    assert not errors(page)
    nothing_from_elsewhere(page)
