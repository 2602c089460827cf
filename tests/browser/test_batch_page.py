"""A batch is understood by mouse: stages by a slider, a line and a point by a click, another batch by its number."""
import pytest
from test_widgets import SETUP, errors, nothing_from_elsewhere, notebook, output, pixels, shot, wait_until  # noqa: F401  (a fixture, too)

pytestmark = pytest.mark.browser
BATCH = SETUP.replace("off_track_mm=1.", "off_track_mm=1., split_ratio=.3, reverse_ratio=.5, noise_mm_forward=.1")


def test_stages_a_line_and_a_point(notebook):  # noqa: F811
    page = notebook("batch.ipynb", BATCH, "preview = BatchPreview(loader, sampler); preview.show_batch('training', 0, 0, model=model); preview")
    widget = output(page, 1)
    side, canvas = widget.locator(".dwiml-side"), widget.locator("canvas.dwiml-picture")
    said = lambda *words: wait_until(lambda: all(word in widget.inner_text() for word in words), said=widget.inner_text)
    said("; loss ", "second part", "noise, SD (mm)")
    wait_until(lambda: (pixels(canvas).max(2) - pixels(canvas).min(2) > 60).sum() > 500)  # lines in colours of their loss
    shot(widget, "batch_page")

    coloured = pixels(canvas)
    height, width = coloured.shape[:2]
    inner = coloured[height//4:3*height//4, width//4:3*width//4]
    y, x = divmod(int((inner.max(2) - inner.min(2)).argmax()), inner.shape[1])
    canvas.click(position={"x": x + width//4, "y": y + height//4})
    along = side.locator('img[alt="along the line"]')
    along.wait_for(timeout=20_000)
    assert along.evaluate("o => o.getBoundingClientRect().width <= o.closest('.dwiml-side').getBoundingClientRect().width")
    yellow = lambda: (abs(pixels(canvas) - [255, 212, 0]).max(2) < 40).sum()
    wait_until(lambda: yellow() > 30)
    shot(widget, "batch_page_line")

    handle = widget.locator(".noUi-handle").first  # of the stages
    handle.focus()
    page.keyboard.press("Home")
    said("as stored")
    wait_until(lambda: yellow() > 30)  # it is still selected
    shot(widget, "batch_page_as_stored")
    handle.focus()
    page.keyboard.press("End")
    said("as the model gets it")
    side.get_by_role("button", name="point").click()
    side.locator('img[alt="around the point"]').wait_for(timeout=20_000)
    shot(widget, "batch_page_point")

    number = widget.locator("input[type=number]").nth(1)
    number.fill("2")
    number.press("Enter")
    said("training batch 2 of", "first part")
    widget.locator("select").first.select_option("validation")
    said("validation batch", "Nothing was done to these lines but resampling.")
    page.set_viewport_size({"width": 820, "height": 1000})
    wait_until(lambda: side.bounding_box()["y"] > canvas.bounding_box()["y"] + canvas.bounding_box()["height"])  # below, where it is narrow
    shot(widget, "batch_page_narrow")
    assert not errors(page)
    nothing_from_elsewhere(page)
