"""`packscore selftest`: is it exact here, how fast is it, and where does the time go."""
