"""The model in torch: cut at a split layer, with adapters, and trained."""
