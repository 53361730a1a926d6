"""tte: an ahead-of-time training compiler for microcontrollers."""

__version__ = "0.1.0"
