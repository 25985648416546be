"""`python -m chuk_lazarus` is the `lazarus` command."""

from .cli import main

main()
