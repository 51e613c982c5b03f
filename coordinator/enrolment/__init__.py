"""What a deployment's broker, coordinator and devices prove themselves with, and who has it."""
