"""The components of a pipeline: transformer, tokenizers, text encoders and autoencoder."""
