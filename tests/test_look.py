"""What every viewer can do, without a browser: each trait changes what is painted, and only that."""
from threading import Thread

import numpy as np
import pytest
import traitlets

from dwiml_nb.viz.panel import Foot
from dwiml_nb.viz.scene import Scene
from dwiml_nb.viz.viewers import RUNGS, Viewer


def arcs(n, seed=0):
    rng, t = np.random.default_rng(seed), np.linspace(0, np.pi, 40)
    return [np.stack([r*np.cos(t), y + 3*np.sin(t), r*np.sin(t)], 1).astype("f4") for r, y in zip(rng.uniform(25, 45, n), rng.normal(0, 4, n))]


def scene_of(n, seed=0):
    affine, i = np.array([[-3., 0, 0, 45], [0, 3, 0, -30], [0, 0, 3, -9], [0, 0, 0, 1]]), np.indices((31, 21, 21))
    blob = np.exp(-((i[0] - 15)**2/60 + (i[1] - 10)**2/30 + (i[2] - 6)**2/30))
    scene = Scene(f"{n} arcs").add_slices(blob, affine, planes="z")
    scene.add_lines(arcs(n, seed), "lines", labels={"subject": np.arange(n) % 2, "bundle": np.arange(n) % 3}, legends={"subject": ["sub-01", "sub-02"]},
                    data_per_line={"score": np.linspace(0, 1, n)}, data_per_point={"loss": np.linspace(0, 2, 40*n)}, info={"id in the study": np.arange(n) + 500})
    return scene.add_lines(arcs(n, seed + 1), "targets", "#b0b0b0")


@pytest.fixture
def viewer():
    viewer = Viewer(scene_of(20), (240, 180))
    yield viewer
    viewer.close()


def seen(viewer, mode="RGB"):
    "The picture on the page; or, with another mode, the still."
    from io import BytesIO
    from PIL import Image
    return np.asarray(Image.open(BytesIO(viewer.face.widget.picture if mode == "RGB" else viewer.face.picture())).convert(mode)).astype(int)


@pytest.mark.parametrize("name, value", [("opacity", .3), ("line_width", 2.), ("line_width", 6.), ("slice_opacity", .2), ("window", .1), ("level", .1), ("length_mm", (100., 120.)),
                                         ("show_targets", False), ("background", "dark"), ("colour", "subject"), ("colour", "bundle"), ("colour", "score"), ("colour", "loss"),
                                         ("view", "axial"), ("azimuth", 90.), ("zoom", 2.), ("planes", "xz"), ("cut_mm", (0., 0., 0.)), ("selection", (3,))])
def test_a_trait_changes_the_picture_and_back_again(viewer, name, value):
    before, kept = seen(viewer), getattr(viewer, name)
    setattr(viewer, name, value)
    assert (seen(viewer) != before).any()
    setattr(viewer, name, kept)
    assert (seen(viewer) == before).all()


@pytest.mark.parametrize("name, value", [("opacity", 1.5), ("slice_opacity", -1.), ("line_width", 100.), ("background", "green"), ("rung", "vtk"), ("view", "top")])
def test_a_value_that_cannot_be_is_refused(viewer, name, value):
    before = getattr(viewer, name)
    with pytest.raises(traitlets.TraitError): setattr(viewer, name, value)
    assert getattr(viewer, name) == before


def test_slices_never_hide_the_lines():
    "Of a line behind an opaque slice something is seen; in front of it, or along an axis, all of it."
    scene = Scene().add_slices(np.ones((9, 9, 9)), np.diag([10., 10, 10, 1]), position_mm=(40, 40, 40), planes="z")
    scene.add_lines([np.float32([[10, 40, z], [70, 40, z]]) for z in (10., 70)], colour="#ff0000")
    viewer = Viewer(scene, (200, 200))
    viewer.view, viewer.elevation = "oblique", 60.
    red = lambda: (lambda p: np.clip(p[..., 0] - p[..., 1], 0, 255))(seen(viewer))
    strength = np.unique(red()[red() > 20])
    assert len(strength) >= 2 and strength.max() == 255 and 40 < strength.min() < 130
    viewer.view = "axial"
    assert (red()[red() > 20] == 255).all()


def test_legends(viewer):
    assert [word for word, _ in viewer.legend] == ["left-right", "front-back", "up-down"]
    viewer.colour = "subject"
    assert [word for word, _ in viewer.legend] == ["sub-01", "sub-02"]
    viewer.colour = "bundle"
    assert [word for word, _ in viewer.legend] == ["0", "1", "2"]
    viewer.colour = "loss"
    assert viewer.legend == (0., 2., "loss", "viridis")


def test_one_colour_means_one_value_in_all_line_sets():
    scene = Scene().add_lines(arcs(2), "a", data_per_line={"score": [0., 1]}).add_lines(arcs(2), "b", data_per_line={"score": [1., 2]})
    a, b = scene.colour_by("score").lines
    assert (a.colours[a.offsets[1]] == b.colours[0]).all() and scene.legend("score") == (0., 2., "score", "viridis")


def test_pointing_clicking_and_lassoing(viewer):
    frame, line = viewer.face.frame(), viewer.scene.lines[0].lines[7].numpy()
    x, y = frame.project(line[20:21])[0]
    number = viewer.point_at((x, y))
    assert viewer.highlighted == number >= 0 and viewer.picked == viewer.scene.info_of(number, int(viewer.picked.split("point ")[1].split()[0]) - 1)
    viewer.click((x, y))
    assert viewer.selection == (number,) and viewer.picked in viewer.message.value
    viewer.click((x, y))
    assert viewer.selection == ()
    assert viewer.point_at((1, 1)) == -1 and viewer.highlighted == -1
    viewer.show_targets = False
    viewer.lasso([(0, 0), (240, 0), (240, 180), (0, 180)])
    assert viewer.selection == tuple(range(20)), "lines that are not shown are not selected"
    viewer.clear_selection()
    assert viewer.selection == ()


def test_a_line_is_named_by_subject_study_length_and_point():
    scene = scene_of(4)
    words = scene.info_of(1, point=3)
    assert words.startswith("lines, sub-02, bundle 1, id in the study 501, ") and f"{scene.lines[0].lengths_mm[1]:.1f} mm" in words and "point 4 of 40" in words


def test_another_face_and_another_scene_keep_traits_and_camera(viewer):
    viewer.colour, viewer.opacity, viewer.length_mm, viewer.selection = "subject", .5, (90., 130.), (2,)
    viewer.face.hear({"kind": "turn", "dx": 50, "dy": 20, "at": [0, 0]})
    before = viewer.face.frame()
    viewer.rung = "browser"
    after = viewer.face.frame()
    assert np.allclose(after.project(viewer.scene.bounds), before.project(viewer.scene.bounds), atol=.5)
    viewer.rung = "painter"
    viewer.replace(scene_of(10, seed=5))
    assert np.allclose(viewer.face.frame().view.right, before.view.right, atol=1e-3)
    assert (viewer.colour, viewer.opacity, viewer.length_mm, viewer.selection, viewer.highlighted) == ("subject", .5, (90., 130.), (), -1)
    assert 0 < viewer.scene.lines[0].shown.sum() < 10 and viewer.scene.look.opacity == .5


def test_controls_are_one_row_and_the_rest_is_folded(viewer):
    controls, shown = viewer.controls, lambda part: part.layout.display != "none"
    assert not shown(controls.folded)
    controls.more.value = True
    assert shown(controls.folded) and all(map(shown, controls.folded.children))
    viewer.rung = "browser"
    hidden = [part for part in (*controls.row.children, *controls.folded.children) if not shown(part)]
    assert hidden == controls.moves and len(hidden) == 5, "the browser has views and cuts of its own, and nothing else goes"
    viewer.rung = "painter"
    assert all(map(shown, controls.row.children))


def test_the_page_says_whether_it_is_dark_and_how_wide_it_is(viewer):
    assert seen(viewer)[90, 2].mean() > 250
    viewer.message.dark = True
    assert seen(viewer)[90, 2].mean() < 60
    assert (seen(viewer, "RGBA")[90, 2] == [125, 136, 148, 0]).all(), "a still may be read on another page"
    viewer.background = "light"
    assert seen(viewer)[90, 2].mean() > 250 and (seen(viewer, "RGBA")[90, 2] == 255).all()
    viewer.face.hear({"kind": "size", "w": 500, "h": 180})
    assert seen(viewer).shape == (180, 500, 3) and viewer.size == (500, 180)


def test_a_scene_that_comes_while_another_face_comes_on_is_drawn(viewer, monkeypatch):
    told = []

    class Slow(RUNGS["painter"]):
        def __init__(self, viewer):
            super().__init__(viewer)
            thread.start()
            thread.join(.1)  # as a tracking that has lines to show meanwhile

        def set_scene(self): told.append(len(self.scene.lines[0])); super().set_scene()
    thread = Thread(target=viewer.replace, args=[scene_of(5)])
    monkeypatch.setitem(RUNGS, "painter", Slow)
    viewer.put_on("painter")
    thread.join()
    assert told == [5]


def test_shorter_lines_and_longer_ones_again_are_all_shown():
    def rods(*mm): return Scene("rods").add_lines([np.array([[0, 0, 0], [n, 0, 0]], "f4") for n in mm])
    viewer = Viewer(rods(10, 30), (240, 180))
    for mm in ((10, 20), (5, 50)):
        viewer.replace(rods(*mm))
        assert viewer.length_mm is None and viewer.scene.lines[0].shown.all() and viewer.controls.lengths.value == (0, mm[1])
    viewer.controls.lengths.value = 0, 20
    assert viewer.length_mm == (0, 20) and viewer.scene.lines[0].shown.tolist() == [True, False]
    viewer.close()


def test_pictures_of_any_size_and_a_page_go_to_the_readers_disk(viewer, monkeypatch, tmp_path):
    sent = {}
    monkeypatch.setattr(Foot, "send", lambda self, message, buffers: sent.update({message["download"]: buffers[0]}))
    viewer.controls.width.value = 600
    viewer.controls.saver.click()
    viewer.controls.pager.click()
    assert not viewer.error and list(sent) == ["20_arcs.png", "20_arcs.html"] and sent["20_arcs.png"].startswith(b"\x89PNG")
    assert b"<title>20 arcs</title>" in sent["20_arcs.html"]
    assert viewer.face.pixels((300, 500)).shape == (500, 300, 3)


def test_a_still_stays_with_fewer_lines_while_it_moves(viewer):
    many = scene_of(2000)
    viewer.replace(many)
    face, rest = viewer.face, viewer.face.widget.picture
    face.hear({"kind": "zoom", "dx": 0, "dy": -100, "at": [120, 90]})
    assert face.widget.picture == rest and face.frames == 1 and face.lines_moving < 2000, "a frame that moves is a message; the picture at rest stays until there is another"
    assert face.frame().scale > 1
    face.hear({"kind": "rest"})
    assert face.widget.picture != rest


def test_a_still_is_renewed_once_when_the_cell_has_ended(monkeypatch):
    "Of a viewer and what it is a part of; in the order in which a cell, then its end, calls them."
    import asyncio
    from types import SimpleNamespace
    import IPython
    from dwiml_nb.viz import panel
    waiting, renewed = [], []
    events = SimpleNamespace(register=lambda _, f: waiting.append(f), unregister=lambda _, f: waiting.remove(f))
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(events=events))
    monkeypatch.setattr(panel, "in_cell", lambda: True)
    part, whole = Viewer(scene_of(3), (60, 40)), panel.Panel()
    part.owner = whole
    for o in (part, whole): o.renew = (lambda o=o, renew=o.renew: (renewed.append(o), renew()))
    for o in (part, whole): o.renewal.function = o.renew

    async def cell():
        part.azimuth = 50.
        part.azimuth = 60.
        whole.renewal()
        assert not renewed
        for f in list(waiting): f()

    asyncio.run(cell())
    assert renewed == [part, whole] and not waiting
    part.close()


def test_controls_of_lines_are_those_of_the_scene_at_hand():
    volume = np.random.default_rng(0).random((5, 5, 5)), np.eye(4)
    viewer = Viewer(Scene("volume").add_slices(*volume))
    row, colours, lengths = viewer.controls.line_row.layout, viewer.controls.colours.layout, viewer.controls.lengths
    assert row.display == colours.display == "none" and viewer.legend == []
    viewer.replace(Scene("lines").add_slices(*volume).add_lines([30*np.eye(3)]))
    assert row.display is colours.display is None and lengths.max == 85 and viewer.controls.targets.layout.display == "none"
    viewer.length_mm = 10., 40.
    assert lengths.value == (10, 40)
    viewer.replace(Scene("more").add_slices(*volume).add_lines([60*np.eye(3)]).add_lines([np.eye(3)], "truth"))
    assert lengths.max == 170 and lengths.value == (10, 40) and viewer.controls.targets.description == "truth"
    viewer.close()
