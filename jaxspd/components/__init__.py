"""What a pipeline has beside its transformer: tokenizers, text encoders and the autoencoder."""
