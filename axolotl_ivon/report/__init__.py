"""One HTML page about an adapter and what was measured with it: `ivon-post report`."""
