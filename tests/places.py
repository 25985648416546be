"""Where things lie in the repository."""

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
FIXTURES = TESTS / "fixtures"
DEMO = ROOT / "src/chuk_lazarus/demo"
