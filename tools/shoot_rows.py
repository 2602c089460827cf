"""The widgets that `shoot_widgets.py` photographs: cells, of which the last shows the widget, and what a hand does with it before.

`act(page, widget, shoot)` uses the page with real clicks; `widget` is the last cell's output, `shoot("word")` takes a picture in between.
"""
import re
from typing import NamedTuple


class Row(NamedTuple):
    "A widget to photograph."
    cells: tuple  # Of its notebook; the last one shows it
    act: object = None  # Function of page, widget, shoot
    seconds: int = 180  # For the cells to run


STUDY = """
import tempfile, torch
from pathlib import Path
from dwiml_nb.all import *
folder = tempfile.mkdtemp()
dataset = MultiSubjectDataset(toy_study(folder)).load_data()
torch.manual_seed(0)
model = Learn2TrackModel(dataset.nb_features['input'], step_size=1., rnn_key='gru', rnn_layer_sizes=[32])
sampler = DWIMLBatchIDSampler(dataset, 'bundles', batch_size_training=40)
loader = DWIMLBatchLoaderOneInput(dataset, model, 'input', 'bundles', off_track_mm=1.)
"""
SUBJECT = """
from dwiml_nb.viz.viewers import show
from dwiml_nb.viz.scene import scene_of_subject
scene = scene_of_subject(dataset.training, 0, 'bundles', 'input')
"""
FIELD = """
import numpy as np, torch
from dwiml_nb.all import *
from dwiml_nb.core.phantom import FieldReader, circling_subject
dataset, grid, volumes = circling_subject()
tracker = Tracker(FieldReader(), dataset, 'sub-01', 'field', 'half', max_length_mm=60., min_length_mm=5.)
seeds = seeds_from_mask(volumes['half'], grid.affine, nt=300)
"""


def picture(widget): return widget.locator("canvas.dwiml-picture, .dwiml-canvas img, img:visible").first


def drag(page, where, dx=120, dy=40):
    "A real drag over the middle of something."
    where.scroll_into_view_if_needed()
    box = where.bounding_box()
    x, y = box["x"] + box["width"]/2, box["y"] + box["height"]/2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + dx, y + dy, steps=8)
    page.mouse.up()
    page.wait_for_timeout(1200)


def press(page, widget, name):
    "A click on a button; the icon before its word is a letter, too."
    widget.get_by_role("button", name=re.compile(rf"^\W*{re.escape(name)}$")).filter(visible=True).first.click()
    page.wait_for_timeout(1500)


def turn(page, widget, shoot):
    drag(page, picture(widget))
    shoot("turned")
    press(page, widget, "more")
    shoot("more")


def viewer(rung): return Row((STUDY, SUBJECT, f"viewer = show(scene, rung='{rung}'); viewer"), turn)


WIDGETS = {
    "viewer_browser": viewer("browser"),
    "viewer_live": viewer("live"),
    "viewer_painter": Row(viewer("painter").cells, lambda page, widget, shoot: (press(page, widget, "coronal"), shoot("coronal"), press(page, widget, "more"), shoot("more"))),
    "player_tracker": Row((FIELD, "player = TrackingPlayer(tracker, seeds); player"), None),
    "player_finished": Row((STUDY, "tractogram = dataset.training[0].streamlines['bundles'].as_tractogram()\nplayer = TrackingPlayer(tractogram); player"), None),
}
