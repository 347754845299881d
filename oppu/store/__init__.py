"""The history store: events, offsets, outbox, heads, claims and what quality is computed from."""
