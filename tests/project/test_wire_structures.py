"""The page of structures is what the code takes, and names nothing that it does not explain."""

import re
from pathlib import Path

from wire_structures import rendered

PAGE = Path(__file__).parents[2] / "docs" / "structures.md"


def test_page_is_made_from_the_code() -> None:
    assert PAGE.read_text() == rendered(), "run: python tests/wire_structures.py > docs/structures.md"


def test_every_structure_named_in_a_field_is_on_the_page() -> None:
    page = rendered()
    defined = set(re.findall(r"^- \*\*(\w+)\*\*", page, re.MULTILINE))
    named = set(re.findall(r"_([A-Z]\w+)_", page))
    assert len(defined) > 100
    assert named <= defined
