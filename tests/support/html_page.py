"""A page as a browser reads it: elements, attributes, words."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET


class Page(HTMLParser):
    """What stands in a page."""

    def __init__(self, html):
        super().__init__()
        self.html = html
        self.elements, self.attributes, self.words, self.charts = [], [], [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs
        if tag == "figure":
            self.charts.append(dict(attrs)["aria-label"])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_data(self, data):
        self.words.append(data)


def needs_no_other_file(page):
    """Assert that a page fetches nothing and runs nothing."""
    fetching = {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}
    fetched = [value for name, value in page.attributes if name in fetching]
    assert [value for value in fetched if not value.startswith("#")] == []
    assert "@import" not in page.html
    assert re.findall(r"url\((?!#)", page.html) == []
    assert {"script", "iframe", "link", "object", "image", "img"} & set(page.elements) == set()
    assert [name for name, _ in page.attributes if name.startswith("on")] == []
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def charts_are_whole(page):
    """Assert that every figure has a drawing, in colours of the page."""
    drawings = re.findall(r"<svg.*?</svg>", page.html, flags=re.DOTALL)
    assert len(drawings) == len(page.charts)
    for drawing in drawings:
        ET.fromstring(drawing)
        assert "var(--" in drawing
        assert "mathdefault" not in drawing
