"""``hsplit-coordinator evaluate``: perplexity and NLG metrics of an exported adapter."""
