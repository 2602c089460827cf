"""A study in a real JupyterLab, as a user goes through it: search, sort, turn the page, click a row, look, choose, read the code."""
import pytest

from test_widgets import errors, notebook, nothing_from_elsewhere, output, shot, wait_until  # noqa: F401 - notebook is a fixture

pytestmark = pytest.mark.browser

SETUP = """
import tempfile, h5py
from dwiml_nb.all import *
from dwiml_nb.study.headers import headers_in, write_index
path = toy_study(tempfile.mkdtemp())
with h5py.File(path, 'r+') as file:
    ids = [f'sub-{i:03}' for i in range(60)]
    ids[7] = 'sub-<img src=x onerror=document.title=1>'
    for s in ids: file.copy('sub-02', s)
    file['sub-012/input/data'][3, 3, 2, 0] = float('nan')
    for name, some in (('training', ids[:40]), ('validation', ids[40:50]), ('testing', ids[50:])): file.attrs[f'{name}_subjs'] = some
    for i, s in enumerate(ids): file[s]['bundles']['data_per_streamline']['bundle'] = [[float(k % 3)] for k in range(120)]
    write_index(file, {s: headers_in(file[s]) for s in ids})
"""


def test_the_study_as_a_table(notebook):  # noqa: F811 - a fixture
    page = notebook("table.ipynb", SETUP, "browser = StudyBrowser(path); browser", "print(browser.code)", "print(browser.subject, browser.leave_out, browser.line_filter)")
    widget, rows = output(page, 1), output(page, 1).locator("table.dataTable tbody tr")
    texts = lambda: rows.all_inner_texts()
    wait_until(lambda: rows.count() == 10 and widget.locator("table.dataTable tbody svg").count() == 10, said=texts)
    assert widget.locator(".dwiml-table").bounding_box()["height"] <= 450
    sides = rows.nth(1).locator("td").evaluate_all("all => all.map(o => getComputedStyle(o).textAlign)")
    assert sides == rows.nth(0).locator("td").evaluate_all("all => all.map(o => getComputedStyle(o).textAlign)") and "right" in sides
    page.set_viewport_size({"width": 820, "height": 1000})
    edge = lambda o: o.bounding_box()["x"] + o.bounding_box()["width"]
    wait_until(lambda: widget.get_by_alt_text("from three sides").filter(visible=True).count() == 1)
    wait_until(lambda: edge(widget.get_by_alt_text("from three sides").filter(visible=True)) <= edge(widget) + 1)
    page.set_viewport_size({"width": 1400, "height": 1000})
    search = widget.locator(".dt-search input")
    search.fill("<img src")
    wait_until(lambda: rows.count() == 1 and "sub-<img src=x onerror" in texts()[0], said=texts)
    assert widget.locator("table.dataTable img").count() == 0, "a name is text"
    search.fill("validation")
    wait_until(lambda: "1 to 10 of 10 (of 60)" in widget.inner_text() and all("validation" in t for t in texts()), said=texts)
    search.fill("sub-01")
    wait_until(lambda: "1 to 10 of 10" in widget.inner_text() and "1: group input: the volume holds NaN" in "".join(texts()), said=texts)
    widget.locator("table.dataTable th", has_text="subject").click()
    widget.locator("table.dataTable th", has_text="subject").click()
    wait_until(lambda: "sub-019" in rows.first.inner_text(), said=texts)
    shot(widget, "table_searched")
    wide = widget.locator(".itables_anywidget").evaluate("o => [o.scrollWidth, o.clientWidth]")
    assert wide[0] <= wide[1], f"a table of {wide[0]} pixels in a cell of {wide[1]}"
    rows.nth(7).locator("td").nth(1).click()  # sub-012
    wait_until(lambda: "120 of 120 lines of bundles of sub-012, over input of sub-012" in widget.inner_text(), said=widget.inner_text)
    pictures = widget.get_by_alt_text("sub-012 from three sides")  # one is in the still, which is hidden
    wait_until(lambda: pictures.filter(visible=True).count() == 1 and "Found: 1 of 1280 voxels" in widget.inner_text(), said=widget.inner_text)
    shot(widget, "table_looked")
    widget.get_by_role("button", name="Leave out").click()
    wait_until(lambda: "dwiml-off" in (rows.nth(7).get_attribute("class") or ""))
    search.fill("")
    widget.get_by_role("button", name="testing", exact=True).click()
    wait_until(lambda: "1 to 10 of 10 (of 60)" in widget.inner_text())
    widget.get_by_placeholder("length_mm >= 20, …").fill("bundle == 1")
    widget.get_by_placeholder("length_mm >= 20, …").press("Enter")
    widget.get_by_placeholder("any", exact=True).fill("25")
    widget.get_by_placeholder("any", exact=True).press("Enter")
    widget.get_by_role("button", name="Code").click()
    wait_until(lambda: "leave_out=['sub-012']" in widget.inner_text() and "line_filter=['length_mm >= 25', 'bundle == 1']" in widget.inner_text(), said=widget.inner_text)
    shot(widget, "table_chosen")
    assert page.title() != "1" and not errors(page)
    nothing_from_elsewhere(page)
