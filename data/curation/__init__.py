"""Which documents are left out? Exact duplicates, near-duplicates, texts of a test set."""
