"""The engine: small models on a CPU, for many requests at once. Knows no MongoDB, no Redis and no network."""
