"""The domains of the training data, one a file; `catalogue` knows them all."""
