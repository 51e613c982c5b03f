"""``state.sqlite``: who took part in a run, and which contributions are in its adapters."""
