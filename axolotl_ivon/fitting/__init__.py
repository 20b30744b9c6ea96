"""A posterior for an adapter that was trained without one: σ around a mean that stays as it is."""
