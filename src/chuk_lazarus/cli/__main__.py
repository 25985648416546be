"""`python -m chuk_lazarus.cli` is the `lazarus` command."""

from . import main

main()
