"""Parts of HTML pages in one file, which load nothing and run no code from elsewhere.

Captions, file names and ids are untrusted. In HTML they are escaped; data for scripts are in JSON blocks, in which no
tag can start. The content security policy of a page allows one script, one style sheet and embedded images.
"""

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from typing import Any


def resource(name: str) -> str:
    """Return the text of a file beside this module."""
    return files("captioner.report").joinpath(name).read_text("utf-8")


def page_start(title: str, style: str, script: str = "") -> str:
    """Return a page up to the start of its content; `page_end` closes it.

    Args:
        title: plain text.
        style: the only style sheet that the page may use.
        script: the only script that the page may run; pass it to `page_end`, too.
    """
    policy = f"default-src 'none'; img-src data:; style-src {_digest(style)}; base-uri 'none'; form-action 'none'"
    if script:
        policy += f"; script-src {_digest(script)}"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
    )


def page_end(script: str = "") -> str:
    """Return the end of a page, with the script that was passed to `page_start`."""
    return (f"<script>{script}</script>\n" if script else "") + "</body>\n</html>\n"


def data_block(name: str, value: Any) -> str:
    """Return a JSON block for a script; `<` is escaped, so that no tag, comment or end of the block can be in it.

    Raises:
        ValueError: a number is infinite or not a number, which JSON cannot hold.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def section(name: str, title: str, content: str) -> str:
    """Return a section with a heading; `title` and `content` are HTML."""
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{content}</section>'


def table(head: str, rows: list[str], name: str) -> str:
    """Return a table that can be scrolled sideways, also by keyboard.

    Args:
        head: the `<thead>`.
        rows: the `<tr>` of each row.
        name: id of the heading that names the table.
    """
    content = f'<table class="figures">{head}<tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}">{content}</div>'


def figure(title: str, note: str, plot: str) -> str:
    """Return a plot below its title and a note, both plain text."""
    caption = f"<figcaption><b>{escape(title)}</b> <span>{escape(note)}</span></figcaption>"
    return f"<figure>{caption}{plot}</figure>"


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
