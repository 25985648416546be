"""What is computed: pure functions on arrays."""
