"""The end of a long run by hand: its figures, printed, and kept with those of other runs."""

import json
from pathlib import Path
from typing import Any


def report(figures: dict[str, Any], results: Path | None) -> int:
    """Print figures, and put them into a JSON file in place of those of the same command; 1 where some run failed."""
    print(json.dumps(figures, indent=2))
    if results:
        runs: list[Any] = json.loads(results.read_text()) if results.exists() else []
        others = [run for run in runs if run["command"] != figures["command"]]
        results.write_text(json.dumps([*others, figures], indent=2) + "\n")
    return 1 if figures["failed"] else 0
