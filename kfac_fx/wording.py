"""Right forms of words in messages and reports: singular and plural, the indefinite article.

Enters: numbers and nouns. Leaves: short texts.
"""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """`1 layer`, `2 layers`, `1,000 layers`: a number with a noun whose plural ends in s."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def with_article(noun: str) -> str:
    """`an int`, `a str`."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
