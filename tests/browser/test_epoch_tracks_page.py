"""The tractograms of a training's epochs under its curves: they come by themselves, follow the newest, and stay where a hand has put them."""
import pytest
from test_widgets import SETUP, errors, nothing_from_elsewhere, notebook, output, shot, time_of_a_cell, wait_until  # noqa: F401  (a fixture, too)

pytestmark = pytest.mark.browser
TRAINER = """
wanted = dict(key='epoch_tracks', nb_seeds=100, reference=folder + '/subjects', tracking=dict(tracking_mask_group='wm_mask', max_length_mm=120.))
trainer = DWIMLTrainerOneInput(model=model, experiments_path=folder, experiment_name='run', batch_sampler=sampler, batch_loader=loader, max_epochs=200,
                               max_batches_per_epoch_training=4, learning_rates=[.005], sinks=[wanted])
dashboard = TrainingDashboard(trainer); dashboard"""


def test_epoch_tracks_under_the_curves(notebook):  # noqa: F811
    page = notebook("epoch_tracks.ipynb", SETUP, TRAINER, "print('at', __import__('time').time(), dashboard.tracks.epoch, dashboard.tracks.follows, dashboard.tracks.viewer is not None and dashboard.tracks.viewer.colour)")
    widget = output(page, 1)
    widget.locator(".js-plotly-plot").wait_for(timeout=60_000)
    slider = widget.locator(".widget-hslider", has_text="epoch").first
    assert slider.count() == 0, "nothing was tracked yet"
    widget.get_by_role("button", name="Start").click()
    slider.wait_for(timeout=60_000)
    canvas = widget.locator("canvas.dwiml-picture:visible, canvas:visible").last
    newest = lambda: int(slider.locator(".widget-readout").inner_text())
    wait_until(lambda: newest() >= 3, 60)
    print("a cell answers in", [round(time_of_a_cell(page, 2), 2) for _ in range(3)])
    canvas.wait_for(timeout=30_000)
    widget.get_by_role("combobox").filter(has_text="verdict").first.select_option("verdict")
    slider.locator(".noUi-handle").focus()
    page.keyboard.press("Home")
    wait_until(lambda: newest() == 1)
    kernel = lambda: (time_of_a_cell(page, 2), output(page, 2).inner_text().split()[-3:])[1]
    wait_until(lambda: kernel() == ["0", "False", "verdict"])  # the browser tells the kernel one change at a time
    wait_until(lambda: "epoch 1: " in widget.inner_text() and "OL" in widget.inner_text())
    shot(widget, "epoch_tracks_first")
    widget.get_by_role("button", name="Stop after epoch").click()
    wait_until(lambda: "stopped; its checkpoint is saved" in widget.inner_text(), 60, said=widget.inner_text)
    assert newest() == 1, "it stays where a hand has put it"
    def at_the_end():
        slider.scroll_into_view_if_needed()
        rail = slider.locator(".noUi-base").bounding_box()
        page.mouse.click(rail["x"] + rail["width"] - 1, rail["y"] + rail["height"]/2)
        return kernel() == [str(newest() - 1), "True", "verdict"] and newest() > 3
    wait_until(at_the_end, said=lambda: (kernel(), slider.inner_text(), slider.inner_html()))  # the last epoch may still be on its way
    wait_until(lambda: f"epoch {newest()}: " in widget.inner_text())
    shot(widget, "epoch_tracks_stopped")
    assert not errors(page)
    nothing_from_elsewhere(page)
