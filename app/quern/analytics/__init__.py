"""Analytics: extract from MongoDB, a star schema in Parquet, and the proof that the two are equal."""
