"""Where are objects read and written? Stores by URI (local, S3, Google), scratch folders, this user's cache."""
