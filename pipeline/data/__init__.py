"""Shards in, device batches out: fbank, manifest, order, reader, augmentation, loader."""
