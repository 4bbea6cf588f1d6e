"""A finetuned run as a model that others can use: MLflow pyfunc, registry, server."""
