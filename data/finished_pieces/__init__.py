"""What is kept of a finished piece of work? Records that carry a hash, sorted tables."""
