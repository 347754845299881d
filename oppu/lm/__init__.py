"""The shared base model: prompts, scoring of allowed outputs, training, and the bank of user adapters."""
