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
STEPS = ", split_ratio=.3, reverse_ratio=.5, noise_mm_forward=.1)"
TRAINED = """
wanted = dict(key='epoch_tracks', nb_seeds=100, reference=folder + '/subjects', tracking=dict(tracking_mask_group='wm_mask', max_length_mm=120.))
trainer = DWIMLTrainerOneInput(model=model, experiments_path=folder, experiment_name='run', batch_sampler=sampler, batch_loader=loader, max_epochs=3,
                               max_batches_per_epoch_training=4, learning_rates=[.005], sinks=[wanted])
trainer.train_and_validate()"""
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


def line_at(picture):
    "Where the most colourful pixel is: a line."
    import numpy as np
    from io import BytesIO
    from PIL import Image
    o = np.asarray(Image.open(BytesIO(picture.screenshot())).convert("RGB")).astype(int)
    h, w = o.shape[:2]
    inner = o[h//4:3*h//4, w//4:3*w//4]
    y, x = divmod(int((inner.max(2) - inner.min(2)).argmax()), inner.shape[1])
    return x + w//4, y + h//4


def click_line(page, widget):
    canvas = picture(widget)
    canvas.scroll_into_view_if_needed()
    (x, y), box = line_at(canvas), canvas.bounding_box()
    page.mouse.click(box["x"] + x, box["y"] + y)
    page.wait_for_timeout(3000)


def turn(page, widget, shoot):
    drag(page, picture(widget))
    click_line(page, widget)
    shoot("turned")
    press(page, widget, "more")
    shoot("more")


def viewer(rung): return Row((STUDY, SUBJECT, f"viewer = show(scene, rung='{rung}'); viewer"), turn)


def look_at_batch(page, widget, shoot):
    shoot("first")
    drag(page, stages := widget.locator(".noUi-handle").first, -80, 0)
    shoot("stage")
    stages.press("End")
    page.wait_for_timeout(1500)
    click_line(page, widget)
    shoot("line")
    press(page, widget.locator(".dwiml-side"), "point")
    shoot("point")


def watch(page, widget, shoot):
    page.wait_for_timeout(3000)
    shoot("whole")
    box = (slider := widget.locator(".dwiml-play input[type=range]")).bounding_box() if widget.locator(".dwiml-play").count() else None
    if box:
        page.mouse.click(box["x"] + .3*box["width"], box["y"] + box["height"]/2)
        page.wait_for_timeout(1000)
        shoot("scrubbed")
        slider.fill(slider.get_attribute("max"))
    click_line(page, widget)
    shoot("asked")


def batch(model, rung=""):
    shown = "preview.show_batch('training', 0, 0, model=model); " if model else ""
    drawn = f"preview.viewer.rung = '{rung}'; " if rung else ""
    return Row((STUDY, f"loader = DWIMLBatchLoaderOneInput(dataset, model, 'input', 'bundles', off_track_mm=1.{STEPS}", f"preview = BatchPreview(loader, sampler); {shown}{drawn}preview"), look_at_batch)


def player(how="", rung=""):
    drawn = f"player.viewer.rung = '{rung}'; " if rung else ""
    return Row((FIELD, f"player = TrackingPlayer(tracker, seeds{how}); {drawn}player"), watch)


WIDGETS = {
    "viewer_browser": viewer("browser"),
    "viewer_live": viewer("live"),
    "viewer_painter": viewer("painter"),
    "viz_tractogram": Row((STUDY, "viz(dataset.training.data[0].streamlines['bundles'].as_tractogram())"), turn),
    "viz_volume": Row((STUDY, "import nibabel as nib\nfile = next(Path(folder).rglob('*.nii.gz'))\nviz(file)"), turn),
    "viz_subject": Row((STUDY, "viz(dataset.training.data[0])"), turn),
    "batch": batch(False),
    "batch_model": batch(True),
    "batch_model_live": batch(True, "live"),
    "player": player(),
    "player_live": player(rung="live"),
    "player_model": Row((STUDY, "tracker = Tracker(model, dataset, 'sub-01', 'input', 'wm_mask', max_length_mm=60., min_length_mm=5.)\nplayer = TrackingPlayer(tracker, 200, truth=Path(folder)/'subjects'/'sub-01'); player"), watch),
    "player_finished": Row((STUDY, "tractogram = dataset.training.data[0].streamlines['bundles'].as_tractogram()\nplayer = TrackingPlayer(tractogram); player"), watch),
    "player_experiment": Row((STUDY, TRAINED, "tracker = experiment_tracker(trainer.experiment_folder, 'sub-01', tracking_mask_group='wm_mask', max_length_mm=60., min_length_mm=5.)\nTrackingPlayer(tracker, 200)"), watch),
    "epoch_tracks": Row((STUDY, TRAINED, "from dwiml_nb.evaluation.tracks_viewer import TracksViewer\nTracksViewer(trainer.experiment_folder, dataset)"), turn),
}
