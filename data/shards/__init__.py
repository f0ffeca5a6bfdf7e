"""How do tokens lie on storage? Token shards, their hashes, the manifest."""
