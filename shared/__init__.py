"""What the device program and the coordinator program must agree on."""
