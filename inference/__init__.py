"""Requests in, predictions out: evidence and adapter combined."""
