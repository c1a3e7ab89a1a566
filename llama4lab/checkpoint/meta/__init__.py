"""Meta's own format: `params.json`, and one `consolidated.NN.pth` for each rank of model parallelism."""
