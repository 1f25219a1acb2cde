"""Division of BERT-like text encoders by the names of their tensors, without running the model."""
