"""Kafka behind two small interfaces, on kafka-python, in memory, and as an embedded real broker."""
