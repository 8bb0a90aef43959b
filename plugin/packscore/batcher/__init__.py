"""The one queue that merges concurrent calls into launches, and the threads that serve it."""
