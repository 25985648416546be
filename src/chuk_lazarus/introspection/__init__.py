"""Looking into models without running them."""
