"""Look at adapters: what one holds, how its training went, how two differ, and its model card."""
