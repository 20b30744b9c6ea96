"""The settings of a run: defaults, presets, YAML keys."""
