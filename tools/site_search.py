"""The words of the site, for the search that stands on every page: titles, exported names, headings, and what is said under them.

They are cut from the pages' HTML when the site is built and lie in one file of plain JavaScript: a page that was opened from a disk
may load that, and nothing else. `site/search.js` looks them up in the reader's browser.
"""
import json
from html.parser import HTMLParser

PAGE, NAME, HEADING = range(3)  # kinds of places
UNSAID = ("details", "script", "style", "math", "iframe", "svg")  # code under its signature, formulas, what widgets bring


class Places(HTMLParser):
    "Cuts the body of a page at its headings: `found` has [anchor, kind, heading, text, signature] each. Shell commands are text, other code is not."
    def __init__(self, title, promise):
        super().__init__()
        self.found, self.skipped, self.depth = [["", PAGE, title, promise + " ", ""]], None, 0
        self.after_rule, self.place = False, 3

    def handle_starttag(self, tag, attributes):
        if self.skipped:
            self.depth += tag == self.skipped
            return
        attributes = dict(attributes)
        if tag == "br": self.handle_data(" ")
        if tag in ("h2", "h3", "h4") and attributes.get("id"):
            self.found.append([attributes["id"], NAME if self.after_rule else HEADING, "", "", ""])
            self.place = 2
        kind, (_, of, *_, signature) = attributes.get("class") or "", self.found[-1]
        if tag == "pre" and of == NAME and not signature: self.place = 4
        elif tag in UNSAID or kind == "shown" or tag == "pre" and kind not in ("sh", "bash"): self.skipped, self.depth = tag, 1
        self.after_rule = tag == "hr"

    def handle_endtag(self, tag):
        if self.skipped:
            self.depth -= tag == self.skipped
            if not self.depth: self.skipped = None
        elif tag in ("h2", "h3", "h4", "p", "li", "td", "th", "pre"):
            self.handle_data(" ")
            if tag[0] in "hp": self.place = 3

    def handle_data(self, data):
        if not self.skipped: self.found[-1][self.place] += data


def places_of(title, promise, body):
    "The places of a page that a reader may want to go to: [anchor, kind, heading, text] each."
    places = Places(title, promise)
    places.feed(body)
    return [[anchor, HEADING if kind == NAME and " " in head.strip() else kind, " ".join(head.split()), " ".join((text + signature).split())]
            for anchor, kind, head, text, signature in places.found]


def words_file(pages):
    "The JavaScript of all pages, [address, title, places] each."
    words = {"pages": [[address, title] for address, title, _ in pages],
             "places": [[number, *place] for number, (_, _, places) in enumerate(pages) for place in places]}
    return f"const SITE_WORDS = {json.dumps(words, ensure_ascii=False, separators=(',', ':'))}\n"
