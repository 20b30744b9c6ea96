"""The bridges to axolotl and lm-evaluation-harness."""
