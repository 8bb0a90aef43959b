"""What the TPU compiler schedules, read on a machine without a TPU: a library of the commands."""
