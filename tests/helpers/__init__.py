"""What several test modules need: checkpoints, hubs, decoders; nothing here is collected as a test."""
