"""The report of a run: what its files say, drawn for people."""
