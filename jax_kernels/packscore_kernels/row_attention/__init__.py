"""Attention of a few rows among all tokens' keys, for whoever reads those rows alone."""
