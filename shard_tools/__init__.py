"""Audio in, WebDataset shards out."""
