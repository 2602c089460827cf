"""The rung that the browser draws: its pixels beside the painter's, the mouse, a busy kernel."""

import numpy as np
import pytest

from dwiml_nb.core.ragged import as_ragged
from dwiml_nb.viz import painter
from dwiml_nb.viz.browser import turning_page
from dwiml_nb.viz.faces import to_jpeg
from dwiml_nb.viz.painter import VIEWS, frame_of, paint, view_from
from dwiml_nb.viz.scene import Scene
from test_widgets import errors, nothing_from_elsewhere, notebook, output, pixels, shot, time_of_a_cell, wait_until  # noqa: F401  (a fixture, too)

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


def test_the_mouse_turns_names_chooses_and_cuts(page):
    opened = page(known_scene(), height=450)
    picture, tip = opened.locator("canvas.dwiml-picture"), opened.locator(".dwiml-hover")
    opened.get_by_role("button", name="coronal").click()
    coronal, box = seen(opened), picture.bounding_box()
    assert not tip.is_visible()
    red = np.argwhere((coronal[..., 0] > 200) & (coronal.min(2) < 60))  # the line from left to right
    y, x = red[np.argsort(red[:, 1])[[len(red) // 4]]][0]
    at = float(box["x"] + x), float(box["y"] + y)
    opened.mouse.move(*at)
    wait_until(tip.is_visible)
    assert tip.inner_text() == "sub-<b>2, line 2, 60.0 mm, point 1 of 2"
    lit = seen(opened)
    assert (lit != coronal).any(2).sum() > 200
    opened.mouse.click(*at)
    opened.mouse.move(box["x"] + 5, box["y"] + 5)
    wait_until(lambda: not tip.is_visible())
    assert (seen(opened) != coronal).any(2).sum() > 200, "it stays lit when it is chosen"
    opened.mouse.click(*at)
    opened.mouse.move(box["x"] + 5, box["y"] + 5)
    wait_until(lambda: (seen(opened) == coronal).all())
    shot(opened, "browser_rung_known")
    opened.mouse.down()
    opened.mouse.move(box["x"] + 105, box["y"] + 45, steps=5)
    opened.mouse.up()
    wait_until(lambda: (seen(opened) != coronal).any(2).mean() > .05)
    opened.get_by_role("button", name="coronal").click()
    wait_until(lambda: (seen(opened) == coronal).all())
    opened.locator(".dwiml-cut input[type=range]").nth(1).fill("20")
    wait_until(lambda: (seen(opened) != coronal).any(2).mean() > .01)
    opened.get_by_role("button", name="lasso").click()
    opened.mouse.move(box["x"] + 5, box["y"] + 5)
    opened.mouse.down()
    for corner in ((box["width"] - 5, 5), (box["width"] - 5, box["height"] - 5), (5, box["height"] - 5)): opened.mouse.move(box["x"] + corner[0], box["y"] + corner[1], steps=3)
    opened.mouse.up()
    gold = lambda: (np.abs(seen(opened) - [255, 212, 0]).max(2) < 4).sum()
    wait_until(lambda: gold() > 300)
    opened.get_by_role("button", name="clear").click()
    wait_until(lambda: gold() == 0)
    with opened.expect_download() as download: opened.get_by_role("button", name="PNG").click()
    assert download.value.suggested_filename == "known.png"


def width_of_the_drawing(page):
    "How much of the picture's width is not paper."
    columns = np.flatnonzero((seen(page) != 255).any(2).any(0))
    return columns[-1] - columns[0]


def test_a_picture_of_another_width_shows_as_much(page):
    opened = page(known_scene(), height=450)
    opened.get_by_role("button", name="coronal").click()
    widths = []
    for width in (820, 1600, 300, 820):
        opened.set_viewport_size({"width": width, "height": 620})
        canvas = opened.locator("canvas.dwiml-picture")
        wait_until(lambda: canvas.evaluate("c => c.width === c.clientWidth && c.clientWidth === c.parentElement.clientWidth"))
        widths.append(width_of_the_drawing(opened))
    assert widths[0] == widths[1] == widths[3] and widths[2] < 300, widths


def test_one_finger_turns_and_two_zoom(page):
    opened = page(known_scene(), height=450)
    opened.get_by_role("button", name="coronal").click()
    box, hand = opened.locator("canvas.dwiml-picture").bounding_box(), opened.context.new_cdp_session(opened)
    before, width = seen(opened), width_of_the_drawing(opened)

    def touch(kind, *fingers):
        points = [{"x": box["x"] + box["width"]/2 + x, "y": box["y"] + 225 + y, "id": i} for i, (x, y) in enumerate(fingers)]
        hand.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})

    touch("Start", (-50, 0), (50, 0))
    for k in range(1, 6): touch("Move", (-50 - 5*k, 0), (50 + 5*k, 0))  # half as far apart again
    touch("End")
    wait_until(lambda: abs(width_of_the_drawing(opened)/width - 1.5) < .02, said=lambda: f"{width_of_the_drawing(opened)} beside {width}")
    opened.get_by_role("button", name="coronal").click()
    wait_until(lambda: (seen(opened) == before).all())
    touch("Start", (0, 0))
    for k in range(1, 6): touch("Move", (20*k, 0))
    touch("End")
    wait_until(lambda: (seen(opened) != before).any(2).mean() > .05)
    assert opened.locator("canvas.dwiml-picture").evaluate("c => getComputedStyle(c).touchAction") == "none"


def test_a_still_stands_in_until_the_card_has_drawn(page, browser):
    scene = known_scene()
    browser.add_init_script("if (location.hash === '#slow') { const of = WebGL2RenderingContext.prototype, ask = of.getSyncParameter; "
                            "of.getSyncParameter = function(...a) { return window.goOn ? ask.apply(this, a) : 0 } }")
    still = to_jpeg(np.full((225, 300, 3), [200, 30, 120], np.uint8))
    opened = page(scene, height=450, still=still)
    wait_until(lambda: opened.locator(".dwiml-standin").count() == 0)
    drawn = pixels(opened.locator(".dwiml-frame"))
    opened.goto(opened.url + "#slow")
    opened.reload()
    frame = opened.locator(".dwiml-frame")
    frame.locator(".dwiml-standin").wait_for()
    wait_until(lambda: np.abs(pixels(frame)[225, 300] - [200, 30, 120]).max() < 9, said=lambda: str(pixels(frame)[225, 300]))
    opened.evaluate("() => { window.goOn = true }")
    wait_until(lambda: frame.locator(".dwiml-standin").count() == 0)
    assert (pixels(frame) == drawn).all()


def test_a_browser_that_cannot_draw_says_so(page, browser):
    browser.add_init_script("if (location.hash === '#old') HTMLCanvasElement.prototype.getContext = () => null")
    opened = page(known_scene())
    opened.goto(opened.url + "#old")
    opened.reload()
    wait_until(lambda: "offers no WebGL 2" in opened.locator(".dwiml-turns").inner_text())


SCENE = """
import numpy as np, time
from dwiml_nb.core.ragged import as_ragged
from dwiml_nb.viz.scene import Scene
from dwiml_nb.viz.viewers import show
def scene(n, seed):
    ends = np.random.default_rng(seed).uniform(-40, 40, (n, 2, 3)).astype(np.float32)
    return Scene(f'{n} lines').add_lines(as_ragged(list(ends))).add_slices(np.random.default_rng(0).random((20, 20, 20)), np.diag([-4, 4, 4, 1]) + np.eye(4, k=3)*40)
"""


def test_a_busy_kernel_keeps_nobody_waiting(notebook, lab):  # noqa: F811
    (lab.folder / "go on").touch()
    opened = notebook("rung.ipynb", SCENE, "viewer = show(scene(200, 0)); viewer", "viewer.rung, viewer.limits", "from pathlib import Path",
                      "while not Path('go on').exists(): sum(range(1000))",
                      "print('at', time.time(), viewer.selection, viewer.cut_mm, viewer.face.widget.camera[:2])",
                      "sent = viewer.face.widget.lines; viewer.colour = 'direction'; viewer.selection = (3,); viewer.face.widget.grow_to(.3)\nassert viewer.face.widget.lines is sent; print('at', time.time())",
                      "viewer.selection = (); viewer.face.widget.grow_to(None); viewer.replace(scene(50, 1)); print('at', time.time())",
                      "viewer.rung = 'painter'; viewer.rung = 'browser'; viewer.view = 'axial'; print('at', time.time())")
    assert "browser" in output(opened, 2).inner_text() and not errors(opened)
    canvas = output(opened, 1).locator("canvas.dwiml-picture")
    canvas.scroll_into_view_if_needed()
    wait_until(lambda: len(np.unique(pixels(canvas).reshape(-1, 3), axis=0)) > 50)
    shot(opened, "browser_rung")
    axial, box = pixels(canvas), canvas.bounding_box()
    (lab.folder / "go on").unlink()
    opened.locator(".jp-Notebook .jp-Cell").nth(4).locator(".jp-InputArea-editor").click()
    opened.keyboard.press("Control+Enter")
    busy = lambda: "*" in opened.locator(".jp-Notebook .jp-Cell").nth(4).locator(".jp-InputPrompt").inner_text()
    wait_until(busy)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    opened.mouse.move(box["x"] + 300, box["y"] + 225)
    opened.mouse.down()
    opened.mouse.move(box["x"] + 400, box["y"] + 165, steps=8)
    opened.mouse.up()
    wait_until(lambda: (pixels(canvas) != axial).any(2).mean() > .02)
    output(opened, 1).locator(".dwiml-cut input[type=range]").nth(2).fill("12")
    wait_until(lambda: "12.0 mm" in output(opened, 1).inner_text())
    assert busy(), "all this while the kernel runs a cell"
    (lab.folder / "go on").touch()
    wait_until(lambda: not busy())
    wait_until(lambda: (time_of_a_cell(opened, 5), "12.0) [-40, 66]" in output(opened, 5).inner_text())[1], said=output(opened, 5).inner_text)
    for cell in (6, 7):
        before = pixels(canvas)
        time_of_a_cell(opened, cell)
        canvas.scroll_into_view_if_needed()
        wait_until(lambda: (pixels(canvas) != before).any(2).sum() > 300)
    assert not errors(opened)
    nothing_from_elsewhere(opened)
