"""The site's search: what it knows of a page, and that it finds it in a browser that is offline, from pages on a disk."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import build_docs
from site_search import HEADING, NAME, PAGE, places_of

BODY = """<p>First <code>words</code>.</p><details class="source"><pre class="python"><code>hidden_code</code></pre></details>
<h2 id="one-beat">One beat</h2><p>It says<br>this &lt;b&gt;.</p><pre class="python"><code>lesson()</code></pre><pre class="sh"><code>dwiml_train run.toml</code></pre>
<div class="shown"><div><p>a widget's words</p></div></div><p>After it.</p>
<hr />
<h3 id="count_lines">count_lines</h3><pre class="python"><code><span>def</span> count_lines(lines, # (S,) of a bundle
):</code></pre><p><em>How many.</em></p><pre class="python"><code>again()</code></pre><hr><h3 id="two-words">Two words</h3>"""


def test_a_page_is_cut_at_its_headings():
    assert places_of("Title", "A promise.", BODY) == [
        ["", PAGE, "Title", "A promise. First words."],
        ["one-beat", HEADING, "One beat", "It says this <b>. dwiml_train run.toml After it."],
        ["count_lines", NAME, "count_lines", "How many. def count_lines(lines, # (S,) of a bundle ):"],
        ["two-words", HEADING, "Two words", ""]]


PAGES = {"docs/lines.md": "# Lines\n\nA bundle of lines &lt;/script&gt;.\n\n## Cut <i>them</i>\n\nHalf a voxel off. Études.\n",
         "docs/deep/space.md": "# Space\n\nVoxels and millimetres.\n\n## Corners\n\nA bundle lies in a corner.\n"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "Two pages as the site has them, one of them a folder deeper, and the signature of a function."
    folder, before = tmp_path_factory.mktemp("site"), (build_docs.ROOT, build_docs.SITE)
    for name, text in PAGES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    build_docs.ROOT, build_docs.SITE = folder, folder / "_docs"
    try:
        known, problems = build_docs.write_pages(list(PAGES), [("Guides", [("Lines", "docs/lines.md"), ("Space", "docs/deep/space.md")])])
        known.append(["docs/lines.html", "Counting", places_of("Counting", "", BODY)])
        build_docs.write_search(known)
    finally: build_docs.ROOT, build_docs.SITE = before
    assert not problems
    return folder / "_docs"


def test_the_words_are_one_file_of_javascript(site):
    text = (site / "search_words.js").read_text(encoding="utf-8")
    assert text.startswith('const SITE_WORDS = {"pages":[["docs/lines.html","Lines"],["docs/deep/space.html","Space"]')
    assert "Études" in text and (site / "search.js").is_file()


@pytest.mark.browser
def test_a_place_is_found_and_gone_to_without_a_network(site, browser):
    page, asked, wrong = browser.new_page(), [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.goto((site / "docs/deep/space.html").as_uri())
    field, found, panel = page.get_by_role("combobox"), page.locator(".found a"), page.locator(".found")
    assert not any(url.endswith("search_words.js") for url in asked)        # only those who search load it

    def look(words, expected):
        field.fill(words)
        found.first.wait_for(timeout=9000)
        heads = found.locator(".head > :first-child").all_text_contents()
        assert heads == expected, words
    page.keyboard.press("/")
    assert field.evaluate("o => o === document.activeElement") and field.input_value() == ""
    look("bundle", ["Lines", "count_lines", "Corners"])                     # a page, a name, a heading: all say it
    look("Count Lines", ["count_lines"])
    look("count_lines()", ["count_lines"])
    look("études voxel", ["Cut them"])
    assert page.locator(".found mark").all_text_contents() == ["voxel", "Études"]
    field.fill("cuont_lines")
    assert panel.inner_text() == "Nothing here says “cuont_lines”. Did you mean count_lines?"
    page.locator(".found button").click()
    assert field.input_value() == "count_lines" and found.count() == 1
    page.keyboard.press("Escape")
    assert panel.is_hidden() and field.input_value() == ""
    page.keyboard.press("/")
    look("bundle", ["Lines", "count_lines", "Corners"])
    for key in ("ArrowUp", "ArrowUp", "ArrowDown", "ArrowUp"): page.keyboard.press(key)
    assert page.locator(".found a[aria-selected=true]").get_attribute("id") == field.get_attribute("aria-activedescendant") == "search-found-1"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    page.wait_for_url("**/docs/lines.html")
    page.set_viewport_size({"width": 400, "height": 600})
    page.keyboard.press("/")
    page.keyboard.type("script>")                                           # what a page says is text here, never code
    found.first.wait_for()
    box = panel.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 400
    assert found.locator(".said").inner_text() == "A bundle of lines </script>."
    page.close()
    assert not wrong and all(url.startswith("file:") for url in asked), asked
