"""What `to_html` leaves, and scenes side by side, in a real browser: they turn together, and a choice shows everywhere."""
from inspect import getsource

import numpy as np
import pytest

from dwiml_nb.viz.panel import page_of, parts_of
from dwiml_nb.viz.scene import Scene
from dwiml_nb.viz.side_by_side import SideBySide
from dwiml_nb.widgets.score_view import ScoreView
from test_widgets import errors, nothing_from_elsewhere, notebook, output, pixels, shot, wait_until  # noqa: F401  (a fixture, too)

pytestmark = pytest.mark.browser

def arcs(n, seed):
    rng, t = np.random.default_rng(seed), np.linspace(0, np.pi, 40)
    return [np.stack([r*np.cos(t), y + 3*np.sin(t), r*np.sin(t)], 1).astype("f4") for r, y in zip(rng.uniform(15, 45, n), rng.normal(0, 6, n))]


def scene(n, seed=0):
    "Arcs in two bundles over a volume."
    lines = Scene(f"{n} arcs").add_lines(arcs(n, seed), labels={"bundle": np.arange(n) % 2}, legends={"bundle": ["front", "<b>back"]})
    return lines.add_slices(np.indices((12, 12, 12)).sum(0), np.diag([6.0, 6, 6, 1]), planes="z")


def drag(page, picture, dx=120, dy=60):
    "A real drag, held: what is seen now is drawn while the button is down."
    box = picture.bounding_box()
    x, y = box["x"] + box["width"]/2, box["y"] + box["height"]/2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + dx, y + dy, steps=6)


def test_a_kept_page_turns_and_chooses(browser, tmp_path):
    beside = SideBySide({"few": scene(8), "many": scene(60, 1)}, (300, 240))
    row = dict(n_valid=5, share=.5, OL=.6, OR=.1, F1=.5)
    found = dict(VS=.6, IB=.1, NC=.3, OL=.7, OR=.2, F1=.6, VB=2, n_bundles=2, n_lines=9, bundles={"front": row, "<b>back": row})
    (tmp_path / "page.html").write_text(page_of([*parts_of(beside), *parts_of(ScoreView({"mine": found}))]))
    page = browser.new_page()
    page.set_viewport_size({"width": 820, "height": 900})
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"file://{tmp_path}/page.html")
    pictures, counts = page.locator("canvas.dwiml-picture"), page.locator(".dwiml-count")
    wait_until(lambda: counts.all_text_contents() == ["8 lines", "60 lines"])
    oblique = page.locator(".dwiml-turns").nth(1).get_by_role("button", name="oblique")
    oblique.click()
    first, second = (pixels(pictures.nth(i)) for i in (0, 1))
    drag(page, pictures.nth(0))
    wait_until(lambda: (pixels(pictures.nth(1)) != second).any(2).mean() > .01)
    page.mouse.up()
    oblique.click()
    wait_until(lambda: (pixels(pictures.nth(0)) == first).all(2).mean() > .999)
    assert page.get_by_label("colour of lines").count() == 1, "one chooser for both"
    page.get_by_label("colour of lines").select_option("bundle")
    for i in (0, 1): wait_until(lambda i=i: (pixels(pictures.nth(i)) != (first, second)[i]).any(2).mean() > .005)
    page.get_by_label("colour of lines").select_option("direction")
    wait_until(lambda: (pixels(pictures.nth(0)) == first).all(2).mean() > .999)
    page.get_by_label("bundle").select_option("front")
    wait_until(lambda: counts.all_text_contents() == ["4 lines", "30 lines"])
    assert page.locator("tr.dwiml-on").count() == page.locator("tr.dwiml-off").count() == 1
    page.locator("tr.dwiml-off").click()
    wait_until(lambda: page.get_by_label("bundle").input_value() == "<b>back")
    page.locator("input[aria-label='shortest length']").fill("100")
    n = sum(int((s.lines[0].lengths_mm >= 99.5)[1::2].sum()) for s in beside.scenes.values())
    wait_until(lambda: sum(int(c.split()[0]) for c in counts.all_text_contents()) == n)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    paper = pixels(page.locator("body"))[2, 2].mean()
    page.emulate_media(color_scheme="dark")
    wait_until(lambda: pixels(page.locator("body"))[2, 2].mean() < paper/3 and pixels(pictures.nth(0))[2, 2].mean() < paper/3)
    shot(page, "viz_page_dark")
    assert not wrong and all(url.startswith(("file:", "blob:", "data:")) for url in asked)
    page.close()
    beside.close()


def test_scenes_turn_together_in_the_notebook(notebook):  # noqa: F811
    page = notebook("beside.ipynb", "import os; os.environ['VK_ICD_FILENAMES'] = os.environ['VK_DRIVER_FILES'] = '/none'\nimport numpy as np\nfrom dwiml_nb.all import *",
                    getsource(arcs) + getsource(scene),
                    "beside = SideBySide({'few': scene(8), 'many': scene(60, 1)}); beside")
    widget = output(page, 2)
    pictures = widget.locator("canvas.dwiml-picture")
    pictures.nth(1).wait_for()
    wait_until(lambda: len(np.unique(pixels(pictures.nth(1)).reshape(-1, 3), axis=0)) > 50)
    widget.scroll_into_view_if_needed()
    second = pixels(pictures.nth(1))
    drag(page, pictures.nth(0))
    wait_until(lambda: (pixels(pictures.nth(1)) != second).any(2).mean() > .01)
    page.mouse.up()
    widget.get_by_label("bundle").select_option("front")
    wait_until(lambda: "few: 4 of 8 lines; many: 30 of 60 lines" in widget.inner_text())
    shot(widget, "beside_in_the_notebook")
    assert "Error in callback" not in page.locator(".jp-Notebook").inner_text()
    assert not errors(page)
    nothing_from_elsewhere(page)
