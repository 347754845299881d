"""A user's history as evidence: dense, BM25, recency and hybrid retrieval, and profiles."""
