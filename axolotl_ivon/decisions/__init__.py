"""What to do with predictions: temperature and pruning ratio, weights of a product, a threshold to abstain."""
