"""What is learnt from labelled records? Records, splits, encoding, heads, metrics; sample tasks as YAML."""
