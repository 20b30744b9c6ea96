"""Functions of arrays: calibration, selective prediction, differences."""
