"""The posterior over the weights of an adapter, q = N(mean, diag(σ²)), and what can be done with it."""
