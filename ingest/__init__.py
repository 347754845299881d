"""Events in: validate, embed, write, dead-letter."""
