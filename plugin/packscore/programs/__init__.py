"""The engine in compiled programs: the only folder that imports jax and torchax."""
