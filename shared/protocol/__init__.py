"""What goes over the wire, without any I/O: messages, topics, codec, chunks, calls."""
