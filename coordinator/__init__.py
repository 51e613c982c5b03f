"""The program on the server: `hsplit-coordinator`."""
