"""docs/families.md says what the layout table and the test checkpoints say."""

import subprocess
import sys

import families


def test_the_page_is_up_to_date() -> None:
    assert families.PAGE.read_text(encoding="utf-8") == families.page(), "run: python tools/families.py"


def test_the_gguf_types_are_those_that_the_package_decodes() -> None:
    from gguf import quants

    assert {kind.name for kind in quants._type_traits} >= set(families.GGML_TYPES)


def test_the_page_is_made_by_its_command() -> None:
    before = families.PAGE.read_bytes()
    subprocess.run([sys.executable, families.__file__], check=True)
    assert families.PAGE.read_bytes() == before
