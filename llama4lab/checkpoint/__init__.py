"""What is on disk: the files of a checkpoint, their names and settings. Gives named tensors; knows no modules."""
