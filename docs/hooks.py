"""Used by MkDocs: references in the style of transformers' docstrings, [`~package.Name`], are shown as `Name`."""

import re


REFERENCE = re.compile(r"\[<code>(?:~(?:\w+\.)*)?([\w.]+)</code>\]")


def on_page_content(html: str, **kwargs: object) -> str:
    """Called by MkDocs with the HTML of each page."""
    return REFERENCE.sub(r"<code>\1</code>", html)
