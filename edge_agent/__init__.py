"""The program on the device: `hsplit-agent`."""
