"""The `lazarus` command."""
