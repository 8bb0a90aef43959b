"""What is read of requests, and what becomes of it: scores, answers, streams."""
