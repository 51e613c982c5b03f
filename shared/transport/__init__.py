"""Ways to move opaque bytes between programs: over a broker, or in memory for tests."""
