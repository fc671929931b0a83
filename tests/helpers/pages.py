"""Checks of an HTML page: well-formed, self-contained, and the cells of its tables."""

import re
from html.parser import HTMLParser

from utils.report import html

VOID = {"meta", "br", "hr", "link", "img"}


class Checker(HTMLParser):
    """Collects text, ids, references, links to files and attributes; fails on tags that do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.refs, self.links, self.text = [], [], [], [], ""

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe"), tag
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name == "id":
                self.ids.append(value)
            if tag == "img" and name == "src":
                assert value.startswith("data:image/png;base64,"), value
            elif tag == "a" and name == "href":
                assert re.fullmatch(r"(\.\./)*([\w-]+/)*[a-z_]+\.(html|json|jsonl|log)", value), value
                self.links.append(value)
            elif name in ("href", "xlink:href", "src"):
                assert value.startswith("#"), value
                self.refs.append(value[1:])
            self.refs += re.findall(r"url\(#([^)]+)\)", value or "")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data


def cells(*values):
    return "".join(f"<td>{value}</td>" for value in values)


def html_of(blocks):
    """Blocks as a page writes them."""
    return html.templates().get_template("blocks.html").module.show(blocks)
