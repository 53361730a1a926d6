"""tte: an ahead-of-time training compiler for microcontrollers."""
