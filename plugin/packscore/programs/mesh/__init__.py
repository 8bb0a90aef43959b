"""One model over several chips: which chips, and what each of them has of the weights."""
