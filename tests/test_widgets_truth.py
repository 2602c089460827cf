"""What widgets say and leave behind is so: stills, choices, interrupted waits, errors, epochs, files and contrast."""
import asyncio
import gc
import html
import itertools
import re
import signal
import threading
import time

import numpy as np
import pytest
import torch

from dwiml_nb.batch.loader import DWIMLBatchLoaderOneInput
from dwiml_nb.batch.sampler import DWIMLBatchIDSampler
from dwiml_nb.batch.spec import ModelSpec
from dwiml_nb.core import files
from dwiml_nb.data.dataset import MultiSubjectDataset
from dwiml_nb.data.overview import SubjectRow
from dwiml_nb.models.base import MainModelAbstract
from dwiml_nb.study.toy import toy_study
from dwiml_nb.training.trainer import DWIMLTrainerOneInput
from dwiml_nb.viz import painter, panel, plots, theme, viewers
from dwiml_nb.viz import study_table as study_table_page
from dwiml_nb.viz.scene import Scene
from dwiml_nb.widgets import study_browser as study_browser_page
from dwiml_nb.widgets.batch_preview import BatchPreview
from dwiml_nb.widgets.study_browser import StudyBrowser
from dwiml_nb.widgets.training_dashboard import TrainingDashboard

WIDGET = "application/vnd.jupyter.widget-view+json"


class OneStep(MainModelAbstract):
    "Learns one constant step."
    def __init__(self, fails_at=None):
        super().__init__(step_size=2.0)
        self.step, self.fails_at, self.seen = torch.nn.Parameter(torch.zeros(3)), fails_at, 0

    def forward(self, inputs, lines):
        self.seen += 1
        if self.seen == self.fails_at: raise ZeroDivisionError("a <b>model</b> that breaks")
        return [self.step.expand(len(line), 3) for line in lines]

    def compute_loss(self, outputs, targets):
        return torch.cat([o[:-1] - t.diff(dim=0) for o, t in zip(outputs, targets)]).square().mean()


@pytest.fixture(autouse=True)
def no_loop():
    "As in a script: the browser of other tests leaves its loop running in this thread."
    loop = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    yield
    asyncio._set_running_loop(loop)


@pytest.fixture(scope="module")
def toy(tmp_path_factory): return MultiSubjectDataset(toy_study(tmp_path_factory.mktemp("study"))).load_data()


@pytest.fixture
def dashboard(toy, tmp_path):
    "A function that makes a dashboard; `pause` seconds go by after each batch."
    names, made = (f"run{i}" for i in itertools.count()), []

    def make(pause=0., **options):
        model = options.pop("model", None) or OneStep()
        trainer = DWIMLTrainerOneInput(model, tmp_path / "experiments", next(names), DWIMLBatchIDSampler(toy, "bundles", 60, 60),
                                       DWIMLBatchLoaderOneInput(toy, model, "input", "bundles"), device="cpu", **options)
        if pause: trainer.control.on_batch_end.append(lambda row: time.sleep(pause))
        made.append(TrainingDashboard(trainer))
        return made[-1]

    yield make
    for o in made: o.stop(); o.wait(30)


@pytest.fixture
def page(monkeypatch):
    "The outputs of a notebook's page: a list of {MIME type: content}; those with a display id are renewed in place."
    outputs, ids = [], {}

    class Handle:
        def __init__(self, name): self.name = name
        def update(self, data, raw): ids[self.name].update(data)

    def display(data, raw=False, display_id=None):
        outputs.append(dict(data))
        name = len(outputs) if display_id is True else display_id
        if name: ids[name] = outputs[-1]
        return Handle(name)

    monkeypatch.setattr(files, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(panel, "in_notebook", lambda: True)
    monkeypatch.setattr(viewers, "best_rung", lambda: ("painter", ""))
    monkeypatch.setattr(panel, "display", display)
    monkeypatch.setattr(panel, "update_display", lambda data, raw, display_id: ids[display_id].update(data))
    return outputs


def text_of(output): return html.unescape(re.sub(r"<style>.*?</style>|<img[^>]*>|<[^>]+>", " ", output["text/html"]))


# ---- what is left in the file

def test_a_widget_and_its_still_are_two_outputs(page, toy):
    browser = StudyBrowser(toy)
    browser._ipython_display_()
    widget, still = page
    assert WIDGET in widget and WIDGET not in still, "JupyterLab prefers the widget to whatever is in the same output"
    assert "sub-01" in text_of(still) and browser.mark in browser.message.rules, "the widget hides its still"
    assert f'class="{browser.mark}"' in still["text/html"] and ":not(:has(.dwiml-panel))" in still["text/html"]
    assert "dwiml-panel" in browser._dom_classes


def test_stills_are_renewed_when_batch_or_subject_change(page, toy):
    loader = DWIMLBatchLoaderOneInput(toy, ModelSpec(step_size=1.), "input", "bundles")
    preview = BatchPreview(loader, DWIMLBatchIDSampler(toy, "bundles", 40))
    preview._ipython_display_()
    stills = [page[1]["text/html"]]
    for change in (preview.next_batch, lambda: setattr(preview, "subject", "sub-02"), lambda: setattr(preview.viewer, "view", "axial")):
        change()
        stills.append(page[1]["text/html"])
    assert len(set(stills)) == 4 and "training batch 2 of" in text_of(page[1]) and "over input of sub-02" in text_of(page[1])


def test_stills_of_a_training(page, dashboard):
    board = dashboard(max_epochs=2)
    board._ipython_display_()
    before, seen = page[1]["text/html"], []
    board.keep_at_times.seconds = 0
    board.trainer.control.on_epoch_end.append(lambda row: seen.append(text_of(page[1])))
    board.start()
    board.wait(30)
    board.renewal.flush()
    assert "ready" in before and "<img" not in before
    assert [re.search(r"epoch \d of \d", text)[0] for text in seen] == ["epoch 2 of 2", "epoch 2 of 2"], "renewed at the end of each epoch"
    assert "ended: epoch 2 of 2" in text_of(page[1]) and "<img" in page[1]["text/html"]


def test_of_a_progress_bar_nothing_is_left(page):
    during = []
    assert sum(i for i in files.progress(range(4), "counting") if during.append(dict(page[0])) is None) == 6
    assert during[0]["text/plain"].startswith("counting:") and not any(WIDGET in output for output in page)
    assert page == [{"text/plain": "", "text/html": files.NO_OUTPUT}]


# ---- choices

def test_the_picture_follows_the_choice_and_says_what_it_is(toy):
    browser = StudyBrowser(toy)
    viewer = browser.look()
    said = [viewer.caption.value]
    for name, value in (("subject", "sub-02"), ("input_group_name", "wm_mask"), ("subset", "validation")):
        setattr(browser, name, value)
        said.append(browser.viewer.caption.value)
    assert said == [f"120 of 120 lines of bundles of {who}, over {image} of {who}" for who, image in
                    (("sub-01", "input"), ("sub-02", "input"), ("sub-02", "wm_mask"), ("sub-03", "wm_mask"))]
    assert len(browser.viewer.scene.lines[0]) == 120 and browser.viewer is viewer
    browser.plot_lengths()
    before = browser.lengths
    browser.subset = "training"
    assert browser.lengths != before, "the lengths of another subset"


def test_of_quick_choices_the_last_one_wins(toy, monkeypatch):
    browser, read = StudyBrowser(toy), []
    browser.look()
    make = study_browser_page.scene_of_subject
    monkeypatch.setattr(study_browser_page, "scene_of_subject", lambda subset, subject, *groups, **options: read.append(subject) or make(subset, subject, *groups, **options))

    async def mouse():
        for row in (1, 0, 1): browser.table.selected = [row]
        await asyncio.sleep(.3)
    asyncio.run(mouse())
    assert read == [1] and "lines of bundles of sub-02" in browser.viewer.caption.value


def test_the_next_batch_keeps_the_subject(toy):
    loader = DWIMLBatchLoaderOneInput(toy, ModelSpec(step_size=1.), "input", "bundles")
    preview = BatchPreview(loader, DWIMLBatchIDSampler(toy, "bundles", 40))
    preview.subject = "sub-02"
    preview.next_batch()
    assert (preview.subject, preview.subjects.value) == ("sub-02", "sub-02") and "of sub-02, over" in preview.viewer.caption.value


def test_a_cut_outside_of_the_next_volume_goes_to_its_middle():
    def scene(shift):
        affine = np.eye(4)
        affine[:3, 3] = shift
        return Scene("a cube").add_slices(np.random.default_rng(0).random((9, 9, 9)), affine, planes="z")
    viewer = viewers.Viewer(scene(0), (80, 60))
    viewer.replace(scene(100))
    assert viewer.cut_mm == (104, 104, 104) and [(s.min, s.max, s.value) for s in viewer.controls.cut_sliders.values()] == [(99.5, 108.5, 104)] * 3


def test_a_picture_that_draws_fewer_lines_says_so(monkeypatch):
    said, scene = [], Scene("a scene").add_lines([np.array([[0, i, 0], [9, i, 9]], dtype="f4") for i in range(50)])
    monkeypatch.setattr(painter, "label", lambda pixels, frame, title, *_: said.append(title) or pixels)
    for options in ({}, {"max_lines": 20}, {"max_lines": 20, "title": ""}): painter.paint(scene, size=(40, 30), **options)
    assert said == ["a scene", "a scene, 20 of 50 lines drawn", "20 of 50 lines drawn"]


def test_a_picture_takes_no_more_dots_than_it_can_show(monkeypatch):
    "Lines from one end of the picture to the other, thousands of them: fewer dots each, and all of them drawn."
    counted, paint_dots = [], painter.paint_dots
    monkeypatch.setattr(painter, "MOST_DOTS", 5000)
    monkeypatch.setattr(painter, "paint_dots", lambda pixels, nearest, at, *more: counted.append(at) or paint_dots(pixels, nearest, at, *more))
    scene = Scene("many").add_lines([np.array([[0, i/40, 0], [99, i/40, 0]], dtype="f4") for i in range(400)])
    picture = painter.paint(scene, size=(200, 120))
    assert 400 <= len(counted[0]) <= 5000 and len(np.unique(counted[0][:, 1].round(3))) == 400 and (picture < 250).any(2).sum() > 100
    frame = painter.Frame(painter.frame_of(scene, "axial").view, np.zeros(3), 1e7, (200, 120))                       # so near that a line is 1e9 pixels long
    at, depth, rows = painter.dots_of(scene.lines[0], frame, 3*np.arange(400))
    assert len(at) == len(depth) == len(rows) <= 5000


# ---- the training

@pytest.fixture
def ctrl_c():
    "Ctrl-C interrupts, also in a job that a shell began in the background."
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def test_an_interrupted_wait_leaves_the_dashboard_right(dashboard, ctrl_c):
    "Python 3.11 marks a thread as ended when its join is interrupted."
    board = dashboard(pause=.02, max_epochs=1000)
    board.start()
    for _ in range(2):
        threading.Timer(.15, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt): board.wait(20)
        assert board.is_running and board.thread.is_alive()
        with pytest.raises(RuntimeError, match="running already"): board.start()
    board.stop()
    assert board.wait(20) == "stopped" and not board.is_running and board.error == ""
    board.trainer.max_epochs = board.trainer.epoch + 1
    board.start()
    assert board.wait(20) == "ended" and board.error == ""


def test_stop_before_start_does_nothing(dashboard):
    board = dashboard(max_epochs=1)
    board.stop()
    board.start()
    assert board.wait(20) == "ended" and board.epoch == 1


def test_a_second_dashboard_of_a_running_training_does_not_start_it(dashboard):
    board = dashboard(pause=.02, max_epochs=1000)
    board.start()
    while not board.trainer.control.is_running: time.sleep(.01)
    other = TrainingDashboard(board.trainer)
    other.start_button.click()
    assert "running already" in other.error and board.is_running
    other.stop()
    assert board.wait(20) == "stopped"


def test_an_error_shows_the_own_line_first(dashboard):
    board = dashboard(model=OneStep(fails_at=3), max_epochs=2)
    board.start()
    assert board.wait(20) == "failed" and type(board.exception) is ZeroDivisionError
    first, _, rest = board.message.value.partition("\n")
    assert first.endswith("in forward)") and "if self.seen == self.fails_at: raise" in first and "test_widgets_truth.py" in first
    assert rest.startswith("ZeroDivisionError: a &lt;b&gt;model") and "<details>" in rest and "train_and_validate" in rest
    board.start()
    assert board.wait(20) == "ended" and board.exception is None and "<details>" not in board.message.value
    at = board.run.log.times("training").tolist()
    assert at == sorted(set(at)) and board.run.log.epochs["epoch"].tolist() == [0, 1], "what was done again is drawn once"


def test_closing_says_that_the_training_goes_on(page, dashboard):
    board = dashboard(pause=.02, max_epochs=1000)
    board._ipython_display_()
    board.start()
    while not board.trainer.control.is_running: time.sleep(.01)
    board.close()
    assert "closed in epoch 1; the training goes on" in text_of(page[1]) and "TrainingDashboard(trainer)" in text_of(page[1])
    assert board.trainer.control.is_running


def test_a_lost_kernel_is_told_with_the_call_that_goes_on(dashboard, toy, tmp_path):
    board = dashboard(max_epochs=1)
    advice = html.unescape(board.message.advice)
    assert advice.startswith("The kernel of this widget is gone.") and f"trainer_from_folder('{tmp_path}/experiments', 'run0')" in advice
    OneStep.__module__, name = "__main__", OneStep.__module__
    try: assert "DWIMLTrainerOneInput.init_from_checkpoint(…)" in board.advice()
    finally: OneStep.__module__ = name
    assert "Run this cell again." in StudyBrowser(toy).message.advice


# ---- what is said

def test_epochs_are_read_from_one(dashboard, caplog, monkeypatch):
    bars = []
    monkeypatch.setattr("dwiml_nb.training.trainer.progress", lambda items, desc, **options: bars.append(desc) or files.progress(items, desc, **options))
    caplog.set_level("INFO")
    board = dashboard(max_epochs=2)
    assert "epoch 1 of 2" in board.told.value and "0 of 2 epochs done" in repr(board.trainer)
    board.start()
    board.wait(30)
    trainer = board.trainer
    batch = trainer.batch_loader.load_batch_streamlines(trainer.batch_sampler.batch(0, epoch=0))
    preview = BatchPreview(trainer.batch_loader, trainer.batch_sampler)
    assert bars == ["epoch 1/2 training", "epoch 1/2 validation", "epoch 2/2 training", "epoch 2/2 validation"]
    assert [r.message.split(":")[0] for r in caplog.records if r.message.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    epochs = [board.curves.traces["run0", "loss", phase, "epoch"] for phase in ("training", "validation")]
    assert [list(trace.x) for trace in epochs] == [[1, 2], [1, 2]] and "epoch 2 of 2" in board.told.value
    assert "2 of 2 epochs done" in repr(board) and "2 of 2 epochs done" in repr(trainer) and "at epoch 2," in repr(trainer.monitor)
    columns = plots.read_logs(trainer.experiment_folder)
    assert columns["epoch"] == [0, 1], "files count from 0"
    assert list(plots.loss_figure(columns).data[0].x) == plots.plot_columns({"run": columns})[0].axes[0].lines[0].get_xdata().tolist() == [1, 2]
    assert "training batch 1 of epoch 1" in repr(batch) and "training batch 1 of epoch 1" in repr(batch.history["ids"])
    assert "training batch 1 of" in preview.info and "in epoch 1:" in preview.info and "training batch 1 of epoch 1:" in preview.viewer.caption.value


def test_a_batch_names_every_augmentation(toy):
    loader = DWIMLBatchLoaderOneInput(toy, ModelSpec(step_size=1.), "input", "bundles", split_ratio=.08, reverse_ratio=.5, segment_mm=20., widen_mm=1.,
                                      off_track_mm=1.5, noise_mm_forward=.1, noise_mm_loss=.2)
    batch = loader.load_batch_streamlines([(0, np.arange(100))])
    said = batch.sentence()
    assert said.startswith("108 lines from 100, ") and "8 cut in two" in said
    for words in ("cut to at most 21 points", f"{int(batch.draws.turned.sum())} read from their other end", "moved as a whole by up to 1 mm",  # rounded
                  f"{int((batch.draws.sigma_mm > 0).sum())} pushed off track (SD up to 1.5 mm), targets lead back",
                  "white noise of 0.1 mm on what the model sees", "white noise of 0.2 mm on the targets"):
        assert words in said, said


def test_controls_come_above_the_table_and_a_still_shows_its_first_rows(toy, monkeypatch):
    many = [SubjectRow("training", 0, f"sub-{i:04}", "", 9, 120) for i in range(1000)]
    monkeypatch.setattr(study_table_page, "subject_rows", lambda dataset, group: many)
    browser = StudyBrowser(toy)
    assert browser.children[2:4] == (browser.message, browser.table) and len(browser.table.rows) == 1000
    assert browser.still().count("<tr") == 51 and "… and 950 more" in browser.still()
    browser.close()


def test_many_histograms_are_one_that_can_be_read():
    rng = np.random.default_rng(0)
    groups = {f"sub-{i:03}": rng.normal(80, 10, 200) for i in range(240)} | {"sub-017": rng.normal(30, 4, 200), "sub-018": np.array([])}
    ax = plots.histogram_picture(groups, "length (mm)").axes[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["all", "5 to 95 %", "median"]
    assert ax.get_title().startswith("240 groups; lowest median sub-017 (29.6)") and len(plots.histogram_figure(groups).data) == 5
    assert plots.histogram_picture({f"sub-{i}": np.array([]) for i in range(9)}).axes[0].get_title() == "9 groups without values"


def test_a_figure_shows_itself_where_nobody_imported_pyplot():
    from IPython.core.formatters import PNGFormatter
    columns = {"epoch": [0, 1], "train_loss": [2., 1.], "valid_loss": [2., 1.]}
    for figure in (plots.plot_columns({"run": columns})[0], plots.histogram_picture({"a": np.arange(9.)})):
        assert PNGFormatter()(figure).startswith(b"\x89PNG")


def test_save_picture_saves_files_and_replaces_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    viewer = viewers.Viewer(Scene("5 of 9 lines of a/b, over x").add_lines([np.eye(3, dtype="f4") * 30]), (120, 90))
    said = [viewer.save_picture(), viewer.save_picture()]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["5_of_9_lines_of_a_b_over.png", "5_of_9_lines_of_a_b_over_2.png"] and [path.name for path in said] == names
    before = (tmp_path / names[0]).read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"): viewer.save_picture(names[0])
    assert (tmp_path / names[0]).read_bytes() == before and viewer.save_picture(names[0], overwrite=True)


def test_text_keeps_its_contrast_in_both_themes():
    rules = re.findall(r"^(.*?) \{ color: (#\w+)", theme.PAGE_STYLE, re.M)
    assert len(rules) == 4
    for selector, colour in rules:
        for paper in (theme.DARK_PAPER, "#111111") if "light" in selector else (theme.PAPER, "#f5f5f5"):
            assert theme.contrast(colour, paper) >= 4.5, (selector, colour, paper)
    style, font = theme.matplotlib_style(), theme.plotly_style()["font"]["color"]
    for colour in (style["text.color"], style["axes.labelcolor"], style["xtick.color"], style["ytick.color"], font): assert theme.contrast(colour, theme.PAPER) >= 4.5


def test_a_widget_that_could_not_be_made_is_silent_when_it_goes(tmp_path, monkeypatch):
    (tmp_path/"study.hdf5").write_bytes(b"no study")
    told = []
    monkeypatch.setattr("sys.unraisablehook", lambda e: told.append(e))
    for make in (StudyBrowser, BatchPreview):
        with pytest.raises(Exception): make(tmp_path/"study.hdf5")
        gc.collect()
    assert not told
