"""Results as rich tables: what a terminal and a notebook show."""
