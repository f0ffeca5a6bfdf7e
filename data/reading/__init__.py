"""How does raw text become documents? Raw shards, JSONL and Parquet in bounded memory, normalisation, splits."""
