"""Many outputs for a prompt, from draws of the posterior, and the choice of one."""
