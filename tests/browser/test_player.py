"""Tracking, watched in a real JupyterLab: lines grow, a reason leaves some of them, a click asks the model."""
import pytest

from test_widgets import errors, notebook, nothing_from_elsewhere, output, pixels, shot, time_of_a_cell, wait_until  # noqa: F401 - notebook is a fixture

pytestmark = pytest.mark.browser

SETUP = """
import torch
from dwiml_nb.all import *
from dwiml_nb.core.phantom import FieldReader, circling_subject
dataset, grid, volumes = circling_subject()
tracker = Tracker(FieldReader(), dataset, 'sub-01', 'field', 'half', max_length_mm=60., min_length_mm=5.)
seeds = seeds_from_mask(volumes['half'], grid.affine, nt=300)
"""


def test_lines_grow_are_sorted_and_asked(notebook):  # noqa: F811 - a fixture
    page = notebook("player.ipynb", SETUP, "player = TrackingPlayer(tracker, seeds); player.viewer.view = 'axial'; player",
                    "print('at', __import__('time').time(), player.viewer.grown, player.reasons, player.line, player.error or 'fine')")
    widget, said = output(page, 1), lambda: (time_of_a_cell(page, 2), output(page, 2).inner_text())[1]
    picture = widget.locator("canvas.dwiml-picture")
    wait_until(lambda: "of 300 seeds" in widget.inner_text() and "tracking" not in widget.inner_text(), said=widget.inner_text)
    ink = lambda: (abs(pixels(picture) - 255).max(2) > 60).mean()  # how much is drawn
    whole = ink()
    shot(widget, "player_whole")
    slider = widget.locator(".dwiml-play input[type=range]")
    box = slider.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 8, box["y"] + box["height"]/2)  # a real drag, from the end to the first steps
    page.mouse.down()
    page.mouse.move(box["x"] + .15*box["width"], box["y"] + box["height"]/2, steps=8)
    page.mouse.up()
    wait_until(lambda: int(slider.input_value()) < 20 and "step 60" not in widget.locator(".dwiml-play").inner_text())
    wait_until(lambda: ink() != whole)
    shot(widget, "player_scrubbed")
    early = float(slider.input_value())
    wait_until(lambda: said().split()[2] == str(early), said=said)  # the kernel has heard of it
    widget.get_by_role("button", name="play", exact=True).click()
    wait_until(lambda: float(slider.input_value()) > early + 5)
    widget.get_by_role("button", name="pause", exact=True).click()
    wait_until(lambda: slider.input_value() == (page.wait_for_timeout(300), slider.input_value())[1])  # it stands still
    slider.fill(slider.get_attribute("max"))
    wait_until(lambda: said().split()[2] == "None", said=said)
    before = pixels(picture)
    widget.get_by_role("button", name="mask", exact=True).click()
    wait_until(lambda: "('mask',)" in said(), said=said)
    wait_until(lambda: (pixels(picture) != before).any(2).mean() > .005)
    shot(widget, "player_reason")
    widget.get_by_role("button", name="mask", exact=True).click()
    box = picture.bounding_box()
    now = pixels(picture)[:, :int(.7*box["width"])]  # beside the legend
    y, x = divmod(int(abs(now - [86, 180, 233]).sum(2).argmin()), now.shape[1])  # 'length' is sky blue
    page.mouse.click(box["x"] + x, box["y"] + y)
    wait_until(lambda: "Line " in widget.inner_text() and "0.0° from the step taken" in widget.inner_text(), said=widget.inner_text)
    line, error = said().split()[-2:]
    assert int(line) >= 0 and error == "fine"
    steps = widget.locator(".widget-slider, .jupyter-widget-slider").last
    words = widget.inner_text()
    steps.locator(".noUi-handle").press("ArrowLeft")
    wait_until(lambda: widget.inner_text() != words)
    drawn = widget.locator("img.jupyter-widgets").first
    wait_until(lambda: drawn.is_visible() and drawn.evaluate("o => o.naturalWidth") > 600)
    shot(widget, "player_asked")
    assert not errors(page)
    nothing_from_elsewhere(page)
