"""The E2E challenge's own csv, rewritten as the LoRA and SplitLoRA papers' lines. Pure.

``name[The Mill], eatType[pub], priceRange[£20-25]`` becomes
``name : The Mill | Type : pub | price : £ 20 - 25 ->``, and a reference its words and runs of
punctuation with one space between. Of the 4,672 lines of the official development set all
prompts and all but 28 references (0.6 %: rare punctuation, such as ``£20-£25``) come out as
those papers' file has them.
"""

from __future__ import annotations

import re

_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
"""What those papers call some attributes; the others keep their names."""

_ATTRIBUTE = r"\s*([^\[\],]+)\[([^\[\]]*)\]\s*"
_MEANING = re.compile(rf"{_ATTRIBUTE}(?:,{_ATTRIBUTE})*")
_WORD = re.compile(r"(?<=\w)'\w+|\w+|'|[^\w\s']+")  # isn't: isn 't


def prompt(meaning: str) -> str | None:
    """Return the prompt of a meaning representation; None where it is none."""
    if not _MEANING.fullmatch(meaning):
        return None
    attributes = re.findall(_ATTRIBUTE, meaning)
    said = [f"{_NAMES.get(name, name)} : {_spaced(value)}" for name, value in attributes]
    return " | ".join(said) + " ->"


def completion(reference: str) -> str:
    """Return a reference as the completion of its prompt, with a space in front."""
    return f" {_spaced(reference)}"


def _spaced(text: str) -> str:
    return " ".join(_WORD.findall(text))
