"""The demo: GRPO on the tiny model through the whole platform, a chat with the result, and the bill."""
