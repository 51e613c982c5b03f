"""From what devices measured to who does what; pure functions. PLANNING.md tells the story."""
