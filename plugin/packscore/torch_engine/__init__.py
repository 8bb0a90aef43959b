"""The engines in torch: packed segments with pages, and a dense mask."""
