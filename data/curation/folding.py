"""Texts as they are compared: letters, marks, digits and symbols, whatever width, case, blanks and punctuation."""

import unicodedata

import regex

_INVISIBLE = regex.compile(r"[\p{Cc}\p{Cf}\p{Default_Ignorable_Code_Point}]+")
"""Controls, soft hyphens, zero-width blanks, directions, fillers, variation selectors (Unicode Annex 44)."""
_MANY_MARKS = regex.compile(r"([\p{M}\uff9e\uff9f]{30})[\p{M}\uff9e\uff9f]++")
"""More marks on a letter than any language writes (Unicode Annex 15, section 13): to order n takes time n squared."""
_BETWEEN_DIGITS = regex.compile(r"(?<=\p{Nd})[\p{P}\p{Z}]+(?=\p{Nd})")
# What the pattern before has left between two digits is one blank; it stays.
_DROPPED = regex.compile(r"(?<!\p{Nd})[\p{P}\p{Z}]++|[\p{P}\p{Z}]++(?!\p{Nd})")


def folded(text: str) -> str:
    """Fold compatibility forms (NFKC) and case, and drop blanks, punctuation and what is not shown.

    Blanks go too, for Chinese has none and lines break anywhere: "word—word", "word - word" and "word\\nword" are one.
    Between two digits they stay as one blank: 1.25 is neither 12.5 nor 125. Marks stay, for they are vowels in Indic
    scripts, but 30 at most on a letter; so do symbols and emoji. A text of punctuation alone is kept with it, so that
    "?" is not "!". Letters of two scripts that look alike remain two.
    """
    few = _MANY_MARKS.sub(r"\1", text)
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", few).casefold())
    shown = " ".join(_INVISIBLE.sub("", " ".join(plain.split())).split())
    words = _DROPPED.sub("", _BETWEEN_DIGITS.sub(" ", shown))
    # Marks that a hidden character or a point stood between are one run now.
    return unicodedata.normalize("NFKC", _MANY_MARKS.sub(r"\1", words)) or shown or text
