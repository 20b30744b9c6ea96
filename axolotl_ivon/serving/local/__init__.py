"""Draws in memory."""
