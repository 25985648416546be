"""From the bytes of a checkpoint to expert matrices in canonical form."""
