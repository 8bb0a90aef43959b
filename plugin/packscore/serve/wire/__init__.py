"""What clients send and read: one file for each family of clients."""
