"""The network: patch and waveform embedding, masking, shared encoder, heads, weights."""
