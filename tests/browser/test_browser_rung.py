"""The rung that the browser draws: its pixels beside the painter's, the mouse, a busy kernel."""

import numpy as np
import pytest

from dwiml_nb.core.ragged import as_ragged
from dwiml_nb.viz import painter
from dwiml_nb.viz.browser import turning_page
from dwiml_nb.viz.painter import VIEWS, frame_of, paint, view_from
from dwiml_nb.viz.scene import Scene
from test_widgets import errors, nothing_from_elsewhere, notebook, output, pixels, shot, wait_until  # noqa: F401  (a fixture, too)

pytestmark = pytest.mark.browser


def turned(x, z):
    "A rotation about x, then z, in degrees."
    (a, b), (c, d) = np.radians([x, z]), (np.cos, np.sin)
    return np.array([[c(b), -d(b), 0], [d(b), c(b), 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c(a), -d(a)], [0, d(a), c(a)]])


def known_scene():
    "A bright and a grey block on an oblique, left-handed, anisotropic grid; lines and points where no two sides are alike."
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turned(15, 20) @ np.diag([-2.0, 2.5, 3.0]), (30, -40, -30)
    volume = np.full((30, 30, 22), 50, np.float32)
    volume[14:22, 12:18, 10:20], volume[4:8, 20:28, 3:12] = 200, 120
    lines = [[[-20, -10, 5], [-20, 20, 5]], [[15, -20, 10], [15, -20, 40]], [[-30, 0, -20], [30, 0, -20]], [[5, 5, 5], [25, 25, 30]]]
    scene = Scene("known").add_lines(as_ragged([np.asarray(line, np.float32) for line in lines]), "lines", labels={"subject": np.array([0, 0, 1, 1])},
                                     legends={"subject": ["sub-01", "sub-<b>2"]})
    return scene.add_slices(volume, affine, position_mm=(3, 4, 2)).add_points([[10, 20, -5], [-25, -25, 15]], size=9)


@pytest.fixture
def page(browser, tmp_path):
    "A function that opens a scene's own page."
    opened = []

    def open_scene(scene, **options):
        (tmp_path / "scene.html").write_text(turning_page(scene, **options))
        page = browser.new_page()
        opened.append(page)
        page.set_viewport_size({"width": 640, "height": 620})
        page.asked, page.wrong = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.goto(f"file://{tmp_path}/scene.html")
        page.locator("canvas.dwiml-picture").wait_for()
        return page

    yield open_scene
    for page in opened:
        assert not page.wrong and all(url.startswith(("file:", "blob:", "data:")) for url in page.asked)
        page.close()


def seen(page):
    "The picture without its letters."
    page.evaluate("() => { document.querySelector('.dwiml-labels').style.visibility = 'hidden' }")
    return pixels(page.locator("canvas.dwiml-picture"))


def away(canvas, scene, view, monkeypatch):
    "The share of pixels that differ from the painter's."
    monkeypatch.setattr(painter, "label", lambda pixels, *_: pixels)
    h, w = canvas.shape[:2]
    return (np.abs(canvas - paint(scene, frame_of(scene, view, (w, h)), title="")).max(2) > 16).mean()


def test_pixels_are_where_the_painter_puts_them(page, monkeypatch):
    scene = known_scene()
    opened = page(scene, height=450)
    for name in ("oblique", *VIEWS):
        view = VIEWS.get(name) or view_from(30, 30)
        opened.get_by_role("button", name=name).click()
        wait_until(lambda: away(seen(opened), scene, view, monkeypatch) < .004, said=lambda: f"{name}: {away(seen(opened), scene, view, monkeypatch):.3%} differ")
        assert away(seen(opened)[:, ::-1], scene, view, monkeypatch) > .05, "another side would be seen"
