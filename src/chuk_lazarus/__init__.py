"""chuk-lazarus: read the expert weights of Mixture-of-Experts checkpoints and say what is inside."""

__version__ = "0.5.0"
