"""The E2E challenge's csv in the form of the LoRA papers' lines.

The expected lines are those of the papers' own file, as the demo's sample and the official
development set have them.
"""

from __future__ import annotations

import pytest

from coordinator.evaluation import e2e


@pytest.mark.parametrize(
    ("meaning", "prompt"),
    [
        (
            "name[Alimentum], area[city centre], familyFriendly[no]",
            "name : Alimentum | area : city centre | family friendly : no ->",
        ),
        (
            (
                "name[The Punter], eatType[coffee shop], food[Chinese], priceRange[£20-25], "
                "customer rating[average], near[Café Sicilia]"
            ),
            (
                "name : The Punter | Type : coffee shop | food : Chinese | price : £ 20 - 25 | "
                "customer rating : average | near : Café Sicilia ->"
            ),
        ),
    ],
)
def test_a_meaning_becomes_a_prompt_of_the_papers(meaning, prompt):
    assert e2e.prompt(meaning) == prompt


@pytest.mark.parametrize("meaning", ["", "name", "name[A", "name[A], oops", "[A]", "a -> b"])
def test_what_is_no_meaning_is_no_prompt(meaning):
    assert e2e.prompt(meaning) is None


@pytest.mark.parametrize(
    ("reference", "completion"),
    [
        (
            "There is a place in the city centre, Alimentum, that is not family-friendly.",
            " There is a place in the city centre , Alimentum , that is not family - friendly .",
        ),
        (
            "Alimentum isn't family-friendly; it's near 'The Bakers'.",
            " Alimentum isn 't family - friendly ; it 's near ' The Bakers ' .",
        ),
        ("It costs £20-25  (or so).", " It costs £ 20 - 25 ( or so )."),
    ],
)
def test_a_reference_becomes_words_with_one_space_between(reference, completion):
    assert e2e.completion(reference) == completion
