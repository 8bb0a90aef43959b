"""Files of records and of scores: read, written, and resumed after a kill."""
