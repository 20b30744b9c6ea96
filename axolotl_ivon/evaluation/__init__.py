"""Predictions of a posterior on data, their quality, and the choice of temperature and pruning ratio."""
