"""The computational graph of the text layers: who writes into the residual stream, who reads it, and every edge."""
