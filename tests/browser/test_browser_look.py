"""What every viewer can do, in a real JupyterLab with a mouse: turn, point, select, follow theme and width, keep a picture."""
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.browser
SCREENSHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"

SETUP = """
import tempfile, numpy as np
from dwiml_nb.all import *
from dwiml_nb.viz.viewers import show
rng, t = np.random.default_rng(0), np.linspace(0, np.pi, 60)
def arcs(n): return [np.stack([r*np.cos(t), y + 3*np.sin(t), r*np.sin(t)], 1).astype('f4') for r, y in zip(rng.normal(35, 3, n), rng.normal(0, 4, n))]
i = np.indices((31, 21, 21))
blob = np.exp(-((i[0] - 15)**2/60 + (i[1] - 10)**2/30 + (i[2] - 6)**2/30))
affine = np.array([[-3., 0, 0, 45], [0, 3, 0, -30], [0, 0, 3, -9], [0, 0, 0, 1]])
def scene_of(n):
    return Scene(f'{n} arcs').add_slices(blob, affine, planes='z').add_lines(arcs(n), 'arcs', labels={'subject': np.arange(n) % 2},
        legends={'subject': ['sub-01', 'sub-02']}, info={'line': np.arange(n) + 1000}, data_per_line={'loss': rng.random(n)})
"""


@pytest.fixture(scope="module")
def page(browser, lab):
    "A notebook with a viewer drawn in the kernel, and a cell that says what it has selected."
    cells = [SETUP, "viewer = show(scene_of(300), rung='painter'); viewer", "print(len(viewer.selection), viewer.size[0], viewer.face.frames, viewer.scene.look.dark)"]
    content = [{"cell_type": "code", "id": f"cell-{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": cell.strip()} for i, cell in enumerate(cells)]
    (lab.folder / "look.ipynb").write_text(json.dumps({"cells": content, "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}},
                                                       "nbformat": 4, "nbformat_minor": 5}))
    page = lab.open(browser, "look.ipynb", own_kernel=False)
    page.wrong = []
    page.on("console", lambda message: page.wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    lab.run_all(page)
    drawn(page)
    yield page
    lab.leave(page)


def shot(where, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    where.screenshot(path=SCREENSHOTS / f"{name}.png")


def picture(page): return page.locator(".dwiml-canvas")


def pixels(where): return np.asarray(Image.open(BytesIO(where.screenshot())).convert("RGB")).astype(int)


def until(page, condition, seconds=60):
    "Wait until something is true of the page."
    for _ in range(seconds * 10):
        if condition(): return
        page.wait_for_timeout(100)
    raise AssertionError(f"not within {seconds} s")


def drawn(page):
    "The picture is as large as its place: the kernel has followed."
    until(page, lambda: page.evaluate("() => { const i = document.querySelector('.dwiml-canvas img'); return i?.complete && i.naturalWidth === i.parentElement.clientWidth }"))


def said(page):
    "Lines selected, width of the picture, frames drawn while it moved, whether it is dark; as Python has them."
    cell = page.locator(".jp-Notebook .jp-Cell").nth(2)
    before = cell.locator(".jp-InputPrompt").first.inner_text()
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    until(page, lambda: cell.locator(".jp-InputPrompt").first.inner_text() not in (before, "[*]:") and cell.locator(".jp-OutputArea-output").count() == 1)
    return cell.locator(".jp-OutputArea-output").inner_text().split()


def middle(page):
    box = page.locator(".dwiml-canvas").bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_a_line_under_the_mouse_is_lit_and_a_click_selects_it(page):
    x, y = middle(page)
    page.mouse.move(x, y - 40)
    page.mouse.move(x, y - 55)
    tip = page.locator(".dwiml-tip")
    until(page, lambda: tip.is_visible() and "mm" in tip.inner_text())
    assert tip.inner_text().startswith("sub-0") and ", line 1" in tip.inner_text() and "point" in tip.inner_text()
    assert len(page.locator(".dwiml-lit").get_attribute("points").split()) == 60
    shot(page, "look_hover")
    page.mouse.down()
    page.mouse.up()
    until(page, lambda: said(page)[0] == "1")
    page.get_by_role("button", name="clear").click()
    until(page, lambda: said(page)[0] == "0")


def test_a_lasso_selects_what_is_inside(page):
    x, y = middle(page)
    page.get_by_role("button", name="lasso").click()
    page.mouse.move(x - 30, y - 90)
    page.mouse.down()
    for dx, dy in ((30, -90), (30, 20), (-30, 20), (-30, -90)): page.mouse.move(x + dx, y + dy, steps=3)
    shot(page, "look_lasso")
    page.mouse.up()
    until(page, lambda: int(said(page)[0]) > 50)
    page.get_by_role("button", name="clear").click()
    assert "dwiml-on" not in (page.get_by_role("button", name="lasso").get_attribute("class") or ""), "one press, one lasso"


def test_it_turns_with_the_mouse_and_is_never_empty(page):
    (x, y), before, frames = middle(page), pixels(picture(page)), int(said(page)[2])
    page.mouse.move(x, y)
    page.mouse.down()
    for k in range(8):
        page.mouse.move(x + 12 * k, y + 4 * k)
        page.wait_for_timeout(60)
        assert page.evaluate("() => document.querySelector('.dwiml-canvas img').naturalWidth") > 0
    page.mouse.up()
    until(page, lambda: (pixels(picture(page)) != before).any(2).mean() > .02)
    assert int(said(page)[2]) > frames
    drawn(page)


def test_one_finger_turns_and_two_magnify(page):
    hand, ink = page.context.new_cdp_session(page), lambda: (pixels(picture(page)) < 230).any(2).mean()
    turned = pixels(picture(page))
    page.get_by_role("button", name="coronal").click()
    until(page, lambda: (pixels(picture(page)) != turned).any(2).mean() > .02)
    drawn(page)
    (x, y), before, inked = middle(page), pixels(picture(page)), ink()

    def touch(kind, *fingers): hand.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": [{"x": x + dx, "y": y, "id": i} for i, dx in enumerate(fingers)]})

    touch("Start", -60, 60)
    for k in range(1, 6): touch("Move", -60 + 5*k, 60 - 5*k)  # three fifths as far apart
    touch("End")
    until(page, lambda: .25 < ink()/inked < .6)
    drawn(page)
    page.get_by_role("button", name="coronal").click()
    until(page, lambda: (pixels(picture(page)) != before).any(2).mean() < .01)
    for _ in range(2):  # a canvas that was dragged once can be dragged again
        now = pixels(picture(page))
        touch("Start", 0)
        for k in range(1, 6): touch("Move", 20*k)
        touch("End")
        until(page, lambda: (pixels(picture(page)) != now).any(2).mean() > .02)
        drawn(page)


def test_it_follows_the_theme_and_the_width_of_its_cell(page):
    widths = []
    for theme in ("Dark", "Light"):
        page.click('text="Settings"')
        page.hover('.lm-Menu-itemLabel:text-is("Theme")')
        page.click(f'.lm-Menu-itemLabel:text-is("JupyterLab {theme}")')
        until(page, lambda: (pixels(picture(page))[60:70, 60:70].mean() < 60) == (theme == "Dark"))
        for width in (820, 1600):
            page.set_viewport_size({"width": width, "height": 1000})
            page.wait_for_timeout(200)
            drawn(page)
            shot(page, f"look_{theme.lower()}_{width}")
            widths.append(int(said(page)[1]))
    assert widths[0] == widths[2] < widths[1] == widths[3] and widths[1] > 1000


def test_picture_and_page_go_to_the_readers_disk(page):
    with page.expect_download(timeout=30_000) as kept: page.get_by_role("button", name="PNG").click()
    assert kept.value.suggested_filename == "300_arcs.png" and Image.open(kept.value.path()).width == 1200
    with page.expect_download(timeout=30_000) as kept: page.get_by_role("button", name="HTML").click()
    assert kept.value.suggested_filename == "300_arcs.html" and "<title>300 arcs</title>" in Path(kept.value.path()).read_text()
    page.locator(".dwiml-panel").get_by_role("button", name="more").last.click()
    page.locator(".dwiml-panel").get_by_text("opacity").wait_for()
    shot(page, "look_more")
    assert not page.wrong
