"""Text of the user in the comments and docstrings of Python that is written.

Enters: names and lines of code, with whatever characters they hold. Leaves: one line each, that ends neither
the comment nor the docstring it stands in.
"""

from __future__ import annotations


def in_comment(text: str) -> str:
    r"""On one line: characters that do not print are escaped, a line break as `\n`."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def in_docstring(text: str) -> str:
    """The same between triple quotes, where backslashes and quotes are escaped too."""
    return in_comment(text).replace("\\", "\\\\").replace('"', '\\"')
