"""Build the site in _docs/ from the executed pages in build/nbs and from docs/*.md, without Quarto; fail on a dead link.

nbdev's own processors turn each page into documentation (signatures with their docments, links on `names` in backticks);
exported code stays, folded under its signature; pandoc writes the HTML. Everything a page shows is in the folder, the words for its
search too (tools/site_search.py): the site works offline.
`build_docs.py --readme` only writes README.md, from nbs/index.ipynb.
"""
import argparse
import base64
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import yaml
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from run_pages import EXPORTS, ROOT, SLOW_IMPORTS
from site_search import places_of, words_file

BUILD, SITE, HERE = ROOT / "build", ROOT / "_docs", Path(__file__).resolve().parent / "site"
ANSI, FENCE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]"), "`" * 6
FORMATTER = HtmlFormatter(nowrap=True)
PLOTLY = "application/vnd.plotly.v1+json"


# ---- one page: notebook → Markdown → HTML

def html_path(source):
    "Where a source file (relative to the repository) lies in the site, as nbdev names it: nbs/00_core/04_ragged.ipynb → 00_core/ragged.html."
    source = Path(source)
    if source.suffix == ".ipynb":
        from nbdev.doclinks import _nbpath2html
        return _nbpath2html(source.relative_to("nbs"))
    return source.with_suffix(".html") if source.suffix == ".md" else source


def fenced(text, kind):
    "`text` as a block of the given kind, whatever it contains."
    return f"{FENCE} {{{kind}}}\n{text.rstrip()}\n{FENCE}"


def picture(data, metadata, suffix, target):
    "Write an image beside the page; return the Markdown that shows it."
    folder = target.with_name(target.stem + "_files")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{len(list(folder.iterdir())) + 1}.{suffix}"
    file.write_bytes(data.encode() if suffix == "svg" else base64.b64decode(data))
    width = metadata.get("width")
    return f"![]({folder.name}/{file.name})" + (f"{{width={width}px}}" if width else "")


def plotly_figure(figure, number):
    "A plotly figure drawn by the site's own copy of plotly.js."
    div = f"plotly-{number}"
    arguments = json.dumps([div, figure["data"], figure.get("layout", {}), {"responsive": True}]).replace("</", "<\\/")
    return fenced(f'<div id="{div}" class="plotly"></div>\n<script>Plotly.newPlot(...{arguments})</script>', "=html")


def output_markdown(output, target, number):
    "One cell output as Markdown: the richest form that a static page can show."
    if output["output_type"] == "stream":
        lines = [line.rsplit("\r", 1)[-1] for line in ANSI.sub("", "".join(output["text"])).replace("\r\n", "\n").split("\n")]
        return fenced("\n".join(lines), ".output") if any(lines) else ""
    if output["output_type"] == "error": return fenced(f"{output['ename']}: {output['evalue']}", ".output")
    data = {kind: value if isinstance(value, dict) else "".join(value) for kind, value in output["data"].items()}
    metadata = output.get("metadata", {})
    if PLOTLY in data: return plotly_figure(data[PLOTLY], number)
    if "text/markdown" in data: return data["text/markdown"]
    if "text/html" in data: return fenced(f'<div class="shown">{data["text/html"]}</div>', "=html")
    for kind, suffix in (("image/svg+xml", "svg"), ("image/png", "png"), ("image/jpeg", "jpg")):
        if kind in data: return picture(data[kind], metadata.get(kind, {}), suffix, target)
    if "text/latex" in data: return data["text/latex"]
    return fenced(ANSI.sub("", data["text/plain"]), ".output") if "text/plain" in data else ""


def page_markdown(notebook, target):
    "The processed notebook as Markdown; an exported cell is folded below the signatures that nbdev made of it."
    parts, folded, signatures = [], [], []
    for number, cell in enumerate(notebook.cells):
        flags = getattr(cell, "directives_", {}) or {}
        said_no = {key.rstrip(":") for key, value in flags.items() if value == ["false"]}
        if cell.cell_type == "raw" or flags.keys() & {"hide", "default_exp"} or "include" in said_no: continue
        outputs = [output_markdown(output, target, f"{number}-{i}") for i, output in enumerate(cell.get("outputs", []))]
        if cell.cell_type == "code" and re.search(r"^show_doc\(", cell.source, re.M):
            signatures = outputs + signatures  # nbdev puts the last definition of a cell first
            continue
        parts += signatures + folded
        folded, signatures = [], []
        code = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()
        if cell.cell_type == "markdown": parts.append(cell.source)
        elif flags.keys() & EXPORTS: folded = [f'<details class="source"><summary>source</summary>\n\n{fenced(code, ".python")}\n\n</details>']
        else:
            if code and "echo" not in said_no: parts.append(fenced(code, ".python"))
            if "output" not in said_no: parts += outputs
    return "\n\n".join(parts + signatures + folded)


def split_title(notebook):
    "Give the sentences that share a cell with the title a cell of their own: nbdev keeps only title and promise of that one."
    from execnb.nbio import mk_cell
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type != "markdown" or not cell.source.startswith("# "): continue
        head = re.match(r"# .*\n?\s*(?:>.*(?:\n|$))*", cell.source)[0]
        notebook.cells.insert(i + 1, mk_cell(cell.source[len(head):], "markdown"))
        cell.source = head
        return


def local_links(html, source):
    "Point the links of a page, written for the repository, at the site; files outside it are copied along."
    from nbdev.config import get_config
    config, here = get_config(), html_path(source).parent
    own = f"{config.doc_host}{config.doc_baseurl}/"

    def relink(match):
        name, url = match[1], match[2].replace("&amp;", "&")
        if url.startswith(own): return f'{name}="{os.path.relpath(url[len(own):], here)}"'
        path, anchor = urldefrag(url)
        if not path or urlparse(url).scheme or "_files/" in path: return match[0]
        file = os.path.normpath(Path(source).parent / unquote(path))
        if (ROOT / file).is_dir():  # a folder of pages: its first one; any other: no link
            pages = sorted((ROOT / file).glob("*.ipynb"))
            if not pages: return ""
            file = str(pages[0].relative_to(ROOT))
        goal = html_path(file)
        if goal == Path(file) and (ROOT / file).is_file():
            (SITE / goal).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, SITE / goal)
        return f'{name}="{os.path.relpath(goal, here)}{"#" + anchor if anchor else ""}"'

    return re.sub(r'\b(href|src)="([^"]*)"', relink, html)


def coloured(html):
    "Colour the code of a page: Pygments takes a twentieth of pandoc's time."
    def colour(match):
        return f'<pre class="{match[1]}"><code>{highlight(unescape(match[2]), get_lexer_by_name(match[1], stripnl=False), FORMATTER).rstrip()}</code></pre>'

    return re.sub(r'<pre\s+class="(python|bash|sh|json|toml)"><code>(.*?)</code></pre>', colour, html, flags=re.S)


def write_page(source, sections):
    "Write the HTML of one source file (relative to the repository); return what the search knows of it: [address, title, places]."
    import pypandoc
    target = SITE / html_path(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.endswith(".ipynb"):
        from nbdev.processors import FilterDefaults, rm_export
        from execnb.nbio import read_nb

        class SitePage(FilterDefaults):
            def base_procs(self): return [processor for processor in super().base_procs() if processor is not rm_export]

        notebook = read_nb(BUILD / source)
        split_title(notebook)
        SitePage()(notebook)
        title, promise = (notebook.frontmatter_.get(key, "") for key in ("title", "description"))
        text, dialect = page_markdown(notebook, target), "markdown+lists_without_preceding_blankline-implicit_figures"
    else:
        text, promise, dialect = (ROOT / source).read_text(encoding="utf-8"), "", "gfm+tex_math_dollars"
        title = re.search(r"^# (.+)$", text, re.M)[1]
        text = text.replace(f"# {title}\n", "", 1)
    top = os.path.relpath(SITE, target.parent)
    variables = {"pagetitle": escape(title), "title": escape(title), "promise": escape(promise), "top": top,
                 "sidebar": sidebar(sections, source), "plotly": "yes" if "Plotly.newPlot" in text else ""}
    html = pypandoc.convert_text(text, "html5", format=dialect, extra_args=[
        "--mathml", "--toc", "--toc-depth=3", f"--template={HERE / 'template.html'}", "--syntax-highlighting=none",
        *(f"--variable={key}:{value}" for key, value in variables.items() if value)])
    html = re.sub(r'<p><a\s+href="[^"]*/blob/[^"]*"[^>]*>source</a></p>', "", html)  # the code itself is folded below
    head, body = html.split("<main>")
    target.write_text(head + "<main>" + coloured(local_links(body, source)), encoding="utf-8")
    return [html_path(source).as_posix(), title, places_of(title, promise, body.partition("</header>")[2].partition("</main>")[0])]


def write_pages(sources, sections):
    "Write several pages in this process; return what the search knows of them, and what went wrong."
    known, problems = [], []
    for source in sources:
        try: known.append(write_page(source, sections))
        except Exception as problem: problems.append(f"{source}: {problem}\n    {problem.__cause__!r}")
    return known, problems


def write_search(known):
    "What every page's search field needs, beside the pages."
    (SITE / "search_words.js").write_text(words_file(known), encoding="utf-8")
    shutil.copy(HERE / "search.js", SITE)


# ---- the whole site

def find_sections():
    "[(section, [(title, source)])] as nbs/sidebar.yml lists them; a folder is a glob."
    def entries(pattern):
        return [(page_title(file), str(file.relative_to(ROOT))) for file in sorted((ROOT / "nbs").glob(pattern), key=lambda p: p.name)]
    sections = []
    for item in yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]:
        name, pattern = ("", item) if isinstance(item, str) else (item["section"], item["contents"])
        sections.append((name, entries(pattern)))
    guides = [(page_title(file), str(file.relative_to(ROOT))) for file in sorted((ROOT / "docs").glob("*.md"))]
    return [section for section in sections + [("Guides", guides)] if section[1]]


def page_title(file):
    "The text of the first '# ' heading."
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb": text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    found = re.search(r"^# (.+)$", text, re.M)
    return found[1].strip() if found else file.stem


def sidebar(sections, current):
    "The navigation, links relative to the page it stands on."
    here = html_path(current).parent
    def link(title, source):
        if source == "nbs/index.ipynb": title = "Start here"
        mark = ' class="here"' if source == current else ""
        return f'<li><a{mark} href="{os.path.relpath(html_path(source), here)}">{escape(title)}</a></li>'
    def block(name, pages):
        links = "".join(link(*page) for page in pages)
        if not name: return f"<ul>{links}</ul>"
        return f"<details{' open' if any(source == current for _, source in pages) else ''}><summary>{escape(name)}</summary><ul>{links}</ul></details>"
    return "".join(block(*section) for section in sections)


class Links(HTMLParser):
    "Collects the anchors of a page, and what it links to or loads."
    def __init__(self):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        if tag == "a" and attributes.get("href"): self.links.append(attributes["href"])
        elif tag in ("img", "script", "iframe", "source") and attributes.get("src"): self.loads.append(attributes["src"])
        elif tag == "link" and attributes.get("href"): self.loads.append(attributes["href"])


def dead_links():
    "Every local link or anchor that leads nowhere, and everything a page would load from the network."
    pages = {}
    for file in SITE.rglob("*.html"):
        pages[file] = Links()
        pages[file].feed(file.read_text(encoding="utf-8"))
    problems = []
    for file, page in pages.items():
        name = file.relative_to(SITE)
        problems += [f"{name} loads {url} from the network" for url in page.loads if urlparse(url).scheme in ("http", "https") or url.startswith("//")]
        for url in page.links + page.loads:
            path, anchor = urldefrag(url)
            if urlparse(url).scheme or url.startswith("//"): continue
            goal = (file.parent / unquote(path)).resolve() if path else file
            if not goal.is_file(): problems.append(f"{name}: no file {url}")
            elif anchor and goal in pages and unquote(anchor) not in pages[goal].anchors: problems.append(f"{name}: no anchor {url}")
    return problems


def build_site():
    "Write every page, then check the links; return the problems found."
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir()
    (SITE / "style.css").write_text(FORMATTER.get_style_defs("pre code") + "\n\n" + (HERE / "style.css").read_text(encoding="utf-8"), encoding="utf-8")
    sections = find_sections()
    sources = [source for _, pages in sections for _, source in pages]
    missing = [source for source in sources if source.endswith(".ipynb") and not (BUILD / source).exists()]
    if missing: return [f"{source} has not been executed: run tools/run_pages.py first" for source in missing]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*SLOW_IMPORTS, "nbdev.processors", "pypandoc"])
    with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:
        groups = [sources[i:i + 6] for i in range(0, len(sources), 6)]
        known, problems = (sum(lists, []) for lists in zip(*pool.map(write_pages, groups, [sections] * len(groups))))
    if problems: return problems
    write_search(known)
    if any("Plotly.newPlot" in file.read_text(encoding="utf-8") for file in SITE.rglob("*.html")):
        from plotly.offline import get_plotlyjs
        (SITE / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    return dead_links()


def readme():
    "README.md as nbs/index.ipynb has it: text and code without outputs, links from the top of the repository."
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = ["<!-- made from nbs/index.ipynb by `make readme` -->"]
    for cell in cells:
        source = "".join(cell["source"]).strip()
        if re.match(r"#\|\s*hide", source): continue
        code = "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip()
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{code}\n```")
    def relink(match):
        url = match[1]
        return match[0] if urlparse(url).scheme or url.startswith("#") else f"]({os.path.normpath(os.path.join('nbs', url))})"
    text = "\n\n".join(parts).replace("\n```\n\n```python\n", "\n\n")  # neighbouring cells become one block
    return re.sub(r"\]\(([^)\s]+)\)", relink, text) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="only write README.md")
    if parser.parse_args().readme: return (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    os.chdir(ROOT)
    os.environ.update(IN_TEST="1", OMP_NUM_THREADS="1", PLOTLY_RENDERER="plotly_mimetype")
    start, problems = time.time(), build_site()
    print(*problems, sep="\n", file=sys.stderr)
    print(f"_docs/index.html: {len(list(SITE.rglob('*.html')))} pages, {len(problems)} problems, {time.time() - start:.0f} s")
    if problems: sys.exit(1)


if __name__ == "__main__":
    main()
