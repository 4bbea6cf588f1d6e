"""Training objectives: masked patches, contrast between representations, classification."""
